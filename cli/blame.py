"""``mp blame``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mergepipe.cli.options import JsonOption, RefArgument, StoreOption, open_store
from mergepipe.cli.show_plan import one_line
from mergepipe.cli.tables import Cell, Row, plural, print_table, shape_text
from mergepipe.cli.terminal import paint, say, say_json
from mergepipe.store.digest import Digest
from mergepipe.store.history import refs_by_commit

if TYPE_CHECKING:
    from mergepipe.merge.blame import Fate, Run, Source, TensorBlame

EXAMPLES: Final = """
mp blame merged/v1 model.layers.3.mlp.up_proj.weight
mp blame merged/v1 'model.layers.3.*'           # one line for each tensor
mp blame merged/v2 lm_head.weight --deep        # through merges of merges
"""
Names = Mapping[Digest, str]


def command(
    ref: RefArgument,
    tensor: Annotated[str, typer.Argument(metavar="TENSOR", help="Its name, or a pattern such as 'model.layers.3.*'.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Follow what the blocks came from, through earlier merges.")
    ] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Say which experts reached each block of a tensor.

    Of a merge: which blocks are the base's own, and which were computed; from which experts, of which of these a
    preview was read, which were left out to stay within the budget, and which have the base's block there. Of what
    was ingested: which commit first brought the block. Reads plans and manifests, no weights.
    """
    from mergepipe.merge.blame import blame, matching_tensors

    with open_store(store) as opened:
        snapshot = opened.snapshot(ref)
        names = matching_tensors(snapshot, tensor, ref)
        asked, behind = blame(opened, snapshot, names, deep=deep)
        with opened.catalog.reading() as view:
            refs = {commit: ", ".join(each.name for each in found) for commit, found in refs_by_commit(view).items()}
    if json:
        answer = {"ref": ref, "commit": snapshot.commit_id.hex()}
        say_json({**answer, "tensors": list(map(_as_json, asked)), "behind": list(map(_as_json, behind))})
        return
    in_lines = tensor not in names
    _print_commit(asked, refs, in_lines=in_lines)
    by_commit: dict[Digest, list[TensorBlame]] = {}
    for each in behind:
        if any(run.fate.commit != each.commit for run in each.runs):  # else it is where the block is from
            by_commit.setdefault(each.commit, []).append(each)
    for found in by_commit.values():
        say()
        _print_commit(found, refs, in_lines=in_lines)


def _print_commit(tensors: Sequence[TensorBlame], refs: Names, *, in_lines: bool) -> None:
    """All tensors of one commit: a line for each, or each with a table of its blocks."""
    first = tensors[0]
    say(f"{first.kind} {_commit(first.commit, refs)}{f': {first.method}' if first.method else ''}")
    if in_lines:
        _print_lines(tensors, refs)
        return
    for tensor in tensors:
        _print_blocks(tensor, refs)


def _print_lines(tensors: Sequence[TensorBlame], refs: Names) -> None:
    if tensors[0].kind == "merge":
        rows: list[Row] = [
            [
                tensor.name,
                str(tensor.count(lambda _: True)),
                str(tensor.count(lambda fate: fate.origin == "computed")),
                _shares(tensor),
            ]
            for tensor in tensors
        ]
        print_table(["tensor", "blocks", "computed", "reached by"], rows, right="blocks computed")
        return
    print_table(
        ["tensor", "blocks", "brought by"],
        [[tensor.name, str(tensor.count(lambda _: True)), _bringers(tensor, refs)] for tensor in tensors],
        right="blocks",
    )


def _shares(tensor: TensorBlame) -> str:
    """``math 3/4, code 1/4 and 2 previews``: blocks that were read of those in which the expert differs."""
    parts = []
    for number, expert in enumerate(tensor.experts):
        read = sum(len(run.blocks) for run in tensor.runs if number in run.fate.reached)
        coarse = sum(len(run.blocks) for run in tensor.runs if number in run.fate.coarse)
        left = sum(len(run.blocks) for run in tensor.runs if number in run.fate.left_out)
        if read or coarse or left:
            previews = f" and {plural(coarse, 'preview')}" if coarse else ""
            parts.append(f"{one_line(expert.name)} {read:,}/{read + coarse + left:,}{previews}")
    return ", ".join(parts)


def _bringers(tensor: TensorBlame, refs: Names) -> str:
    counts: Counter[Digest] = Counter()
    for run in tensor.runs:
        if run.fate.commit is not None:
            counts[run.fate.commit] += len(run.blocks)
    return ", ".join(f"{_commit(commit, refs)}{f' {count:,}' * (len(counts) > 1)}" for commit, count in counts.items())


def _print_blocks(tensor: TensorBlame, refs: Names) -> None:
    entry = tensor.entry
    cut = f"{plural(len(entry.blocks), 'block')} of {shape_text(entry.chunks)}"
    say(f"{paint(tensor.name, 'cyan')}  {entry.dtype}  {shape_text(entry.shape)}, {cut}")
    if tensor.kind != "merge":
        rows: list[Row] = [[_span(run), _commit(run.fate.commit, refs)] for run in tensor.runs]
        print_table(["blocks", "brought by"], rows)
        return
    print_table(
        [
            "blocks",
            "from",
            "reached by",
            "by previews of",
            "left out",
            "same as the base",
            "of a type that is not merged",
        ],
        [
            [
                _span(run),
                _from(tensor, run.fate),
                Cell(_names(tensor, run.fate.reached), "green"),
                Cell(_names(tensor, run.fate.coarse), "cyan"),
                Cell(_names(tensor, run.fate.left_out), "yellow"),
                _names(tensor, run.fate.same),
                _names(tensor, run.fate.unmerged),
            ]
            for run in tensor.runs
        ],
    )


def _span(run: Run) -> str:
    return str(run.first) if run.first == run.last else f"{run.first}-{run.last}"


def _from(tensor: TensorBlame, fate: Fate) -> str:
    """``base``, ``computed on base``, ``computed, and the same as math's``."""
    base = _tensor_of(tensor.reference, tensor.name)
    if fate.origin == "own":
        return base
    if fate.equals is not None:
        models = (tensor.reference, *tensor.experts)
        return f"computed, and the same as {_tensor_of(models[fate.equals], tensor.name)}'s"
    return f"computed on {base}" if tensor.based else "computed"


def _tensor_of(source: Source | None, name: str) -> str:
    """A model's name, with the tensor's where that is another one there."""
    if source is None:
        return ""
    return one_line(source.name) + (f":{source.tensor}" if source.tensor != name else "")


def _names(tensor: TensorBlame, experts: Iterable[int]) -> str:
    return ", ".join(_tensor_of(tensor.experts[number], tensor.name) for number in experts)


def _commit(commit: Digest | None, refs: Names) -> str:
    if commit is None:
        return ""
    return f"{commit.short} ({refs[commit]})" if commit in refs else commit.short


def _as_json(tensor: TensorBlame) -> dict[str, Any]:
    return {
        "commit": tensor.commit.hex(),
        "kind": tensor.kind,
        "name": tensor.name,
        "blocks": len(tensor.entry.blocks),
        "method": tensor.method,
        "base": _source_json(tensor.reference) if tensor.reference is not None else None,
        "experts": [_source_json(expert) for expert in tensor.experts],
        "runs": [_run_json(tensor, run) for run in tensor.runs],
    }


def _source_json(source: Source) -> dict[str, str]:
    return {"name": source.name, "commit": source.commit.hex(), "tensor": source.tensor, "kind": source.kind}


def _run_json(tensor: TensorBlame, run: Run) -> dict[str, Any]:
    fate = run.fate
    models = (tensor.reference, *tensor.experts)
    equal = models[fate.equals] if fate.equals is not None else None
    experts = {
        name: [tensor.experts[number].name for number in numbers]
        for name, numbers in (
            ("reached", fate.reached),
            ("coarse", fate.coarse),
            ("left_out", fate.left_out),
            ("same", fate.same),
            ("unmerged", fate.unmerged),
        )
    }
    return {
        "first": run.first,
        "last": run.last,
        "origin": fate.origin,
        **experts,
        "equals": equal.name if equal is not None else None,
        "commit": fate.commit.hex() if fate.commit is not None else None,
    }
