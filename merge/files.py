"""The files of a result that are not weights: the donor's, with what the merge changes in its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from mergepipe.merge.assemble import source_layers
from mergepipe.merge.plan import Plan
from mergepipe.store.digest import hash_bytes
from mergepipe.store.errors import BadInputError
from mergepipe.store.frame import Kind
from mergepipe.store.manifest import FileEntry
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.staging import Staging

CONFIG: Final = "config.json"


def result_files(donor: Snapshot, plan: Plan, staging: Staging) -> Mapping[str, FileEntry]:
    """The donor's files; config.json is staged anew where the plan changes it.

    Raises:
        BadInputError: config.json is no JSON object.
    """
    if not plan.config or CONFIG not in donor.files:
        return donor.files
    try:
        value: Any = json.loads(donor.read_file(CONFIG))
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"the {CONFIG} of {plan.models[plan.files].name!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInputError(f"the {CONFIG} of {plan.models[plan.files].name!r} is no JSON object")
    changed = {**value, **{("dtype" if _new_name(name, value) else name): new for name, new in plan.config.items()}}
    if "num_hidden_layers" in plan.config:
        changed |= _types_of_layers(value, source_layers(plan))
    if changed == value:
        return donor.files
    return {**donor.files, CONFIG: _store(json.dumps(changed, indent=2, ensure_ascii=False).encode() + b"\n", staging)}


def _types_of_layers(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """``layer_types``, which newer configurations list: each layer's is that of the layer that it comes from."""
    types = config.get("layer_types")
    if not isinstance(types, list) or any(number >= len(types) for number in layers):
        return {}
    return {"layer_types": [types[number] for number in layers]}


def _new_name(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the configuration calls its element type ``dtype``, as newer ones do."""
    return name == "torch_dtype" and "dtype" in config and "torch_dtype" not in config


def _store(data: bytes, staging: Staging) -> FileEntry:
    digest = hash_bytes(data)
    if staging.claim(digest):
        staging.add_block(Kind.FILE, digest, np.frombuffer(data, np.uint8), 1)
    return FileEntry(len(data), (digest,))
