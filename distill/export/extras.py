"""Packages that some formats need and the project does not."""

from __future__ import annotations

import importlib
from importlib.metadata import version


def need(*packages: str, extra: str) -> None:
    """
    Args:
        packages: names to import.
        extra: the optional dependencies of this project that install them.

    Raises:
        ValueError: names those that are missing, and the extra.
    """
    missing = [name for name in packages if not _is_there(name)]
    if missing:
        raise ValueError(
            f"format {extra} needs {' and '.join(missing)}: pip install 'spikeswap[{extra}]' (or .[{extra}])"
        )


def _is_there(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def versions_of(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}
