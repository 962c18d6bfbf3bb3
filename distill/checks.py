"""How a configuration refuses a value."""

from __future__ import annotations

from typing import Any


def check(good: bool, name: str, value: Any, allowed: str) -> None:
    """Raises a ValueError that names the field, what it may be and what it is, unless `good`."""
    if not good:
        raise ValueError(f"{name} must be {allowed}, found {value!r}")
