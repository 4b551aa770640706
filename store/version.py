"""The version that commits are stamped with."""

from typing import Final

VERSION: Final = "0.1.0"
TOOL: Final = f"mergepipe {VERSION}"
