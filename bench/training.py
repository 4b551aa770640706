"""Train a real family: a small causal language model on text that this machine has, and an expert for each domain.

    python bench/training.py OUT --seed 0 --minutes 6          # base/, expert-python/, expert-c/, ...
    python bench/training.py OTHER --from OUT --lora           # the same base, deltas of low rank
    python bench/training.py OTHER --from OUT --sparse         # the same base, a tenth of the tensors changed

The base sees all domains alike; each expert goes on from the base, as stored in bfloat16, with one domain alone.
Training is in float32 on one thread. The split into training and held-out text is by file. Beside the
checkpoints: `held-out.json` with the token ids to score on, `training.json` with the losses, of the weights as stored.

`--minutes` sets the numbers of steps, at a slow core's nominal speed; no clock decides anything, so the same arguments
on the same machine give the same weights.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from itertools import count, islice
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Text
TRAIN_BYTES, HELD_OUT_BYTES = 2_000_000, 150_000  # of each domain, at most
MINIMUM_TRAIN_BYTES, MINIMUM_HELD_OUT_BYTES = 300_000, 40_000
FILE_BYTES = 32_768  # of each file, so that a domain is many files
HELD_OUT_FILES = 8  # every eighth, by the hash of its name
END, VOCABULARY = "<|end|>", 2048

# The model and its training
CONTEXT, BATCH, SCORED_WINDOWS = 128, 8, 64
STEPS_PER_MINUTE = 165  # on one slow core
BASE_SHARE, EXPERT_SHARE = 0.52, 0.10  # of the minutes; the rest is reading and scoring
BASE_RATE = 3e-3
RANK = 8
SPARSE_SHARE = 0.1

HeldOut = dict[str, torch.Tensor]  # domain -> token ids; here (windows, CONTEXT + 1)


class TrainingError(Exception):
    """The machine has too little text, or the folder cannot be used."""


@dataclass(frozen=True, slots=True)
class Source:
    """Files whose name matches, below a folder that need not exist; folders named in `without` are passed over."""

    root: str
    patterns: tuple[str, ...]
    without: tuple[str, ...] = ()


_LIBRARY, _PACKAGES = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
_PERL = [f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}/{name}" for name in ("perl-base", "perl")]

DOMAINS: dict[str, tuple[Source, ...]] = {
    "python": (Source(_LIBRARY, ("*.py",), ("site-packages", "test", "tests", "pydoc_data", "encodings")),),
    "c": (
        Source(sysconfig.get_path("include"), ("*.h",)),
        Source("/usr/include", ("*.h",)),
        Source(f"{_PACKAGES}/torch/include", ("*.h",)),
    ),
    "prose": (
        Source("/usr/share/common-licenses", ("*",)),
        Source("/usr/share/doc", ("README*", "NEWS*", "*.txt", "*.txt.gz", "*.md", "*.rst")),
        Source("/usr/share/man/man1", ("*.1.gz",)),
        Source("/usr/share/man/man7", ("*.7.gz",)),
        Source(_PACKAGES, ("METADATA", "LICENSE*", "README*", "*.md", "*.rst")),
    ),
    "perl": (
        *(Source(root, ("*.pm", "*.pl"), ("unicore", "Unicode")) for root in _PERL),
        Source("/usr/share/perl", ("*.pm", "*.pl"), ("unicore", "Unicode")),
        Source("/usr/share/perl5", ("*.pm", "*.pl")),
    ),
}


@dataclass(frozen=True, slots=True)
class Text:
    """One domain's files, split."""

    train: list[str]
    held_out: list[str]


def _files(source: Source) -> Iterator[Path]:
    for folder, folders, names in os.walk(source.root):
        folders[:] = sorted(set(folders) - set(source.without))
        for name in sorted(names):
            path = Path(folder, name)
            if any(fnmatch(name, pattern) for pattern in source.patterns) and not path.is_symlink():
                yield path


def _read(path: Path) -> str | None:
    """The beginning of a text file; None where it cannot be read, is hardly anything, or is not UTF-8."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(FILE_BYTES)
        if len(data) == FILE_BYTES:
            data = data[: data.rfind(b"\n") + 1]
        text = data.decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return None
    return text if len(text) >= 512 and "\0" not in text else None


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def read_domain(name: str) -> Text:
    """The text of a domain: files in the order of their names' hashes, none twice, until there is enough."""
    paths = {str(path): path for source in DOMAINS[name] for path in _files(source)}
    text, sizes, seen = Text([], []), [0, 0], set()
    for key in sorted(paths, key=_hash):
        part = int(_hash(f"held out {key}") % HELD_OUT_FILES == 0)
        if sizes[part] >= (TRAIN_BYTES, HELD_OUT_BYTES)[part]:
            if min(sizes[0] - TRAIN_BYTES, sizes[1] - HELD_OUT_BYTES) >= 0:
                break
            continue
        content = _read(paths[key])
        if content is None or _hash(content) in seen:
            continue
        seen.add(_hash(content))
        (text.train, text.held_out)[part].append(content)
        sizes[part] += len(content)
    if sizes[0] < MINIMUM_TRAIN_BYTES or sizes[1] < MINIMUM_HELD_OUT_BYTES:
        where = ", ".join(source.root for source in DOMAINS[name])
        raise TrainingError(
            f"too little text for the domain {name!r}: {sizes[0]:,} bytes to train on and {sizes[1]:,} to hold out, "
            f"where {MINIMUM_TRAIN_BYTES:,} and {MINIMUM_HELD_OUT_BYTES:,} are needed. Looked below {where}"
        )
    return text


def make_tokenizer(texts: Mapping[str, Text]) -> Tokenizer:
    """A byte-level BPE of VOCABULARY tokens, from the training text of all domains."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((content for text in texts.values() for content in text.train), trainer)
    return tokenizer


def _tokens(tokenizer: Tokenizer, contents: Sequence[str]) -> torch.Tensor:
    ids = [token for each in tokenizer.encode_batch(list(contents)) for token in (*each.ids, 0)]
    return torch.tensor(ids)


def _windows(tokens: torch.Tensor) -> torch.Tensor:
    """SCORED_WINDOWS windows of CONTEXT + 1 tokens, spread evenly."""
    starts = torch.linspace(0, len(tokens) - CONTEXT - 1, SCORED_WINDOWS).long()
    return torch.stack([tokens[start : start + CONTEXT + 1] for start in starts.tolist()])


def held_out_losses(model: Any, held_out: HeldOut) -> dict[str, float]:
    """For each domain, nats for each token of the held-out text."""
    model.eval()
    losses = {}
    with torch.no_grad():
        for domain, windows in held_out.items():
            parts = [_loss(model, batch).item() * len(batch) for batch in torch.split(windows, 16)]
            losses[domain] = sum(parts) / len(windows)
    return losses


def _loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps, and the highest learning rate: up over a twentieth, then down a cosine to a tenth."""

    steps: int
    rate: float

    def factor(self, step: int) -> float:
        warm = max(1, self.steps // 20)
        if step < warm:
            return (step + 1) / warm
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def window_losses(model: Any, streams: Sequence[torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    """Without end, the loss of a batch of windows drawn from the streams in turn."""
    generator = torch.Generator().manual_seed(seed)
    for first in count(step=BATCH):
        batch = []
        for row in range(BATCH):
            stream = streams[(first + row) % len(streams)]
            start = int(torch.randint(len(stream) - CONTEXT, (1,), generator=generator))
            batch.append(stream[start : start + CONTEXT + 1])
        yield _loss(model, torch.stack(batch))


def train(model: Any, losses: Iterator[torch.Tensor], schedule: Schedule) -> None:
    """Train the parameters that want a gradient: a step for each loss, which is computed as it is asked for."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, schedule.rate, betas=(0.9, 0.95), weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    model.train()
    for loss in islice(losses, schedule.steps):
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()


def new_model(seed: int) -> Any:
    """3.4 M parameters, seeded."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def load_model(folder: Path) -> Any:
    """A checkpoint of this family, in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


class _LowRank(torch.nn.Module):
    """`weight + B @ A`: what LoRA adds."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = torch.nn.Parameter(torch.randn(RANK, columns) / math.sqrt(columns))
        self.b = torch.nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


@dataclass(frozen=True, slots=True)
class Kind:
    """How experts are trained: what changes, and how fast."""

    name: str
    rate: float

    def prepare(self, model: Any, seed: int) -> None:
        if self.name == "full":
            return
        torch.manual_seed(seed)
        model.requires_grad_(False)
        matrices = [name for name, weight in model.named_parameters() if weight.ndim == 2]
        if self.name == "sparse":
            count = math.ceil(SPARSE_SHARE * sum(1 for _ in model.parameters()))
            for index in torch.randperm(len(matrices))[:count].tolist():
                model.get_parameter(matrices[index]).requires_grad_(True)
            return
        for layer in [layer for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear)]:
            parametrize.register_parametrization(layer, "weight", _LowRank(layer.weight))

    def finish(self, model: Any) -> None:
        """Merge what was added into the weights."""
        for layer in [layer for layer in model.modules() if parametrize.is_parametrized(layer)]:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


KINDS = {kind.name: kind for kind in (Kind("full", 1.5e-4), Kind("lora", 4e-3), Kind("sparse", 2e-3))}


@dataclass(frozen=True, slots=True)
class Delta:
    """How far an expert is from its base, both as stored: elements and tensors changed, as shares; L2, relative."""

    elements_changed: float
    tensors_changed: float
    relative_norm: float


def delta_of(base: Mapping[str, torch.Tensor], expert: Mapping[str, torch.Tensor]) -> Delta:
    changed = {name: (expert[name] != weight).sum().item() for name, weight in base.items()}
    squares = sum((expert[name].double() - weight.double()).square().sum().item() for name, weight in base.items())
    whole = sum(weight.double().square().sum().item() for weight in base.values())
    elements = sum(weight.numel() for weight in base.values())
    tensors = sum(1 for count in changed.values() if count) / len(changed)
    return Delta(sum(changed.values()) / elements, tensors, math.sqrt(squares / whole))


def _save(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)  # type: ignore[no-untyped-call]
    wrapped.save_pretrained(folder)


def _make_base(folder: Path, tokenizer: Tokenizer, streams: Sequence[torch.Tensor], steps: int, seed: int) -> None:
    model = new_model(seed)
    train(model, window_losses(model, streams, seed), Schedule(steps, BASE_RATE))
    _save(model, tokenizer, folder)


def write_held_out(family: Path, held_out: HeldOut) -> None:
    rows = {name: tokens.tolist() for name, tokens in held_out.items()}
    (family / "held-out.json").write_text(json.dumps(rows) + "\n")


def read_held_out(family: Path) -> HeldOut:
    return {name: torch.tensor(rows) for name, rows in json.loads((family / "held-out.json").read_text()).items()}


@dataclass(frozen=True, slots=True)
class Options:
    """`source` is a family whose base is taken; None where the base is to be trained."""

    out: Path
    seed: int
    minutes: float
    kind: Kind
    source: Path | None


def tell(start: float, name: str, scores: Mapping[str, float]) -> None:
    figures = "  ".join(f"{domain} {score:.3f}" for domain, score in scores.items())
    print(f"{time.perf_counter() - start:6.1f} s  {name:14} {figures}", flush=True)


def make_family(options: Options) -> None:
    """Write the whole family; raises TrainingError where there is too little text."""
    start = time.perf_counter()
    texts = {name: read_domain(name) for name in DOMAINS}
    base = options.out / "base"
    if options.source is not None:
        shutil.copytree(options.source / "base", base)
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    else:
        tokenizer = make_tokenizer(texts)
    streams = {name: _tokens(tokenizer, text.train) for name, text in texts.items()}
    held_out = {name: _windows(_tokens(tokenizer, text.held_out)) for name, text in texts.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    write_held_out(options.out, held_out)
    steps = options.minutes * STEPS_PER_MINUTE
    tell(start, "tokens", {name: float(len(stream)) for name, stream in streams.items()})
    if options.source is None:
        _make_base(base, tokenizer, list(streams.values()), round(BASE_SHARE * steps), options.seed)
    losses = {"base": held_out_losses(load_model(base), held_out)}
    tell(start, "base", losses["base"])
    deltas = {}
    for number, (name, stream) in enumerate(streams.items(), 1):
        model, seed = load_model(base), 1000 * options.seed + number
        options.kind.prepare(model, seed)
        schedule = Schedule(round(EXPERT_SHARE * steps), options.kind.rate)
        train(model, window_losses(model, [stream], seed), schedule)
        options.kind.finish(model)
        folder = options.out / f"expert-{name}"
        _save(model, tokenizer, folder)
        losses[name] = held_out_losses(load_model(folder), held_out)
        deltas[name] = delta_of(load_file(base / "model.safetensors"), load_file(folder / "model.safetensors"))
        tell(start, name, losses[name])
    report = {
        "kind": options.kind.name,
        "seed": options.seed,
        "minutes": options.minutes,
        "seconds": round(time.perf_counter() - start, 1),
        "losses": losses,
    }
    write_report(options.out, report, texts, deltas)


def write_report(out: Path, report: Mapping[str, Any], texts: Mapping[str, Text], deltas: Mapping[str, Delta]) -> None:
    """`training.json`: what the script has to say, and what every family has."""
    whole = {
        **report,
        "files": {name: {"train": len(text.train), "held_out": len(text.held_out)} for name, text in texts.items()},
        "deltas": {name: asdict(delta) for name, delta in deltas.items()},
    }
    (out / "training.json").write_text(json.dumps(whole, indent=2) + "\n")
    for name, delta in deltas.items():
        print(f"{name}: {delta.elements_changed:.1%} of the elements changed, {delta.relative_norm:.4f} of the norm")


def refuse_to_overwrite(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise TrainingError(f"{out} is not empty: choose another folder, or remove it")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a base and an expert for each domain.")
    parser.add_argument("out", type=Path, help="folder to write into; must not be there, or be empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=6, help="how long on one slow core, about (6)")
    parser.add_argument("--from", dest="source", type=Path, help="take the base of this family")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--lora", action="store_const", dest="kind", const="lora", help="deltas of low rank")
    kinds.add_argument("--sparse", action="store_const", dest="kind", const="sparse", help="a tenth of the tensors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        refuse_to_overwrite(args.out)
        make_family(Options(args.out, args.seed, args.minutes, KINDS[args.kind or "full"], args.source))
    except (TrainingError, OSError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
