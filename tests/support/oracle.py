"""Whole merges by the real mergekit. Importing it imports mergekit, which takes seconds; nothing asks the network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face's is imported

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import load_config, make_tasks
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


@contextmanager
def _in(folder: Path) -> Iterator[None]:
    """Paths in recipes are relative to the folder; loaders that an earlier run left are of other folders."""
    LoaderCache().loaders.clear()
    with chdir(folder):
        yield
    LoaderCache().loaders.clear()


def merge(text: str, folder: Path, out: Path, **given: Any) -> Path:
    """What mergekit makes of a recipe whose models lie in ``folder``; returns ``out``, a checkpoint folder.

    ``given``: fields of mergekit's ``MergeOptions``.
    """
    usual = {"device": "cpu", "quiet": True, "write_model_card": False, "copy_tokenizer": False, "random_seed": 0}
    options: Any = MergeOptions(**{**usual, "lora_merge_cache": str(out.parent / "lora"), **given})
    with _in(folder):
        if "\n---" in text:
            configs, needs = load_config(text, str(out.parent / "named"))
            for task in make_tasks(configs, needs, options, str(out.parent / "named"), str(out), lazy=True):
                _run(task)
        else:
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options)
    return out


def _run(task: Any) -> None:
    for needed in task.input_merges.values():
        _run(needed)
    task.execute()


def tensors_of(folder: Path) -> Tensors:
    """All tensors of a checkpoint folder."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found
