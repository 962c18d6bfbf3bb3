"""Energy beside accuracy, in the tables that are printed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

KINDS = ("compute", "memory")


def energy_columns(
    rows: Sequence[dict[str, Any] | None], reference: dict[str, Any] | None
) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of two columns: arithmetic and memory traffic.

    Args:
        rows: rows of a frontier; None for an empty line.
        reference: the row of the analogue network, of which percentages are given; None: microjoule an image.
    """
    headings = [f"{kind} ({'uJ' if reference is None else '%'})" for kind in KINDS]
    cells = []
    for row in rows:
        line = []
        for kind, heading in zip(KINDS, headings, strict=True):
            text = (
                "" if row is None else _cell(row[f"{kind}_uj"], None if reference is None else reference[f"{kind}_uj"])
            )
            line.append(text.rjust(len(heading)))
        cells.append(line)
    return headings, cells


def _cell(value: float, whole: float | None) -> str:
    return f"{value:.3g}" if whole is None else f"{100 * value / whole:.1f}"


def energy_lines(
    assumptions: Sequence[str], reference: dict[str, Any] | None, what: str = "the teacher's"
) -> list[str]:
    """What the columns mean and rest on."""
    said = "energy: of arithmetic and of memory traffic, per image"
    if reference is not None:
        both = ", ".join(f"{kind} {reference[f'{kind}_uj']:.3g} uJ" for kind in KINDS)
        said += f", in percent of {what} ({both})"
    bullets = [textwrap.fill(text, 100, initial_indent="- ", subsequent_indent="  ") for text in assumptions]
    return [said, *"\n".join(bullets).splitlines()]
