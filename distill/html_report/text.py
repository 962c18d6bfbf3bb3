"""Numbers and names as the report writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

SPACE = "\u00a0"
"""Between a number and its unit: lines do not break there."""
NO_NUMBER, ELLIPSIS = "\u2013", "\u2026"


def percent(value: Any, digits: int = 2) -> str:
    """A number of percent, as accuracies are kept."""
    return f"{value:.{digits}f}{SPACE}%" if is_number(value) else NO_NUMBER


def share(value: Any, digits: int = 1) -> str:
    """A share in [0, 1], as percent."""
    return percent(100 * value, digits) if is_number(value) else NO_NUMBER


def figures(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where it is neither huge nor tiny."""
    if not is_number(value):
        return NO_NUMBER
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if not -9 <= places <= 8:
        return f"{value:.{digits - 1}e}"
    return f"{round(value, places):,.{max(places, 0)}f}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f}{SPACE}s"
    if seconds < 7200:
        return f"{seconds / 60:.0f}{SPACE}min"
    return f"{seconds / 3600:.1f}{SPACE}h"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether something is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def shortened(name: str, most: int) -> str:
    """A name of at most so many characters: the middle of a longer one is left out."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}{ELLIPSIS}{name[len(name) - tail :]}"


def abbreviated(names: Sequence[str], most: int) -> list[str]:
    """Names for one place, each of at most so many characters, that stay different where that can be.

    Where one is too long, those of several dotted parts lose the parts that they all begin or end with.
    """
    if max(map(len, names), default=0) <= most:
        return list(names)
    dotted = [name.split(".") for name in names if "." in name]
    shortest = min(map(len, dotted), default=0)
    head = tail = 0
    if len(dotted) > 1:
        head = next((i for i in range(shortest) if len({p[i] for p in dotted}) > 1), shortest - 1)
        tail = next((i for i in range(shortest - head) if len({p[-1 - i] for p in dotted}) > 1), shortest - head - 1)

    def short(name: str) -> str:
        parts = name.split(".")
        if "." not in name or head + tail == 0:
            return shortened(name, most)
        kept = ".".join(parts[head : len(parts) - tail])
        return shortened(f"{ELLIPSIS if head else ''}{kept}{ELLIPSIS if tail else ''}", most)

    return [short(name) for name in names]


def cleaned(value: Any) -> Any:
    """JSON or YAML values whose texts hold only characters that XML and UTF-8 can: others become U+FFFD."""
    if isinstance(value, str):
        return "".join(c if _allowed(c) else "\ufffd" for c in value)
    if isinstance(value, dict):
        return {cleaned(name): cleaned(item) for name, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, list) else value


def _allowed(character: str) -> bool:
    code = ord(character)
    return (
        character in "\t\n" or 0x20 <= code < 0x7F or 0xA0 <= code < 0xD800 or 0xE000 <= code < 0xFFFE or code > 0xFFFF
    )
