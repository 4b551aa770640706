"""What lies in a checkpoint's folder: all files, and no link that leads out of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from mergepipe.store.canonical import as_text
from mergepipe.store.errors import BadInputError

_SKIPPED_FOLDERS: Final = frozenset({".git", ".mp", "__pycache__"})


def walk_folder(top: Path) -> dict[str, Path]:
    """All files below ``top`` by relative path; raises BadInputError for links that lead out of it."""
    found: dict[str, Path] = {}
    allowed = [top.resolve(), *_hub_blobs(top)]

    def refuse(error: OSError) -> None:
        raise BadInputError(f"{error.filename}: cannot be read: {error.strerror}", hint="Check its owner and mode.")

    for folder, folders, names in os.walk(top, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in [*folders, *sorted(names)]:
            path = Path(folder, name)
            relative = path.relative_to(top).as_posix()
            if path.is_symlink():
                target = path.resolve()
                if not any(target.is_relative_to(place) for place in allowed):
                    raise BadInputError(
                        f"{path} is a link that leads out of the folder, to {target}",
                        hint="Copy the file into the folder, or leave it out.",
                    )
                if target.is_dir():
                    raise BadInputError(f"{path} is a link to a folder", hint="Copy the folder instead.")
            if path.is_file():
                check_utf8(relative, path)
                found[relative] = path
            elif not path.is_dir():
                raise BadInputError(f"{path} is neither a file nor a folder", hint="Leave it out.")
    return found


def _hub_blobs(top: Path) -> list[Path]:
    """Where the hub's cache keeps the files that a snapshot's folder links to (``snapshots/REV -> blobs/``)."""
    resolved = top.resolve()
    if resolved.parent.name == "snapshots" and (resolved.parent.parent / "blobs").is_dir():
        return [resolved.parent.parent / "blobs"]
    return []


def check_utf8(relative: str, path: Path) -> None:
    """Raises BadInputError for a file's name that is no text."""
    if as_text(relative) != relative:
        raise BadInputError(f"{str(path)!r}: the file's name is not UTF-8", hint="Rename it.")
