"""The colours of the report, for light and for dark, and how they get from drawings into style sheets.

A drawing names a colour by its role. It is drawn in a stand-in, a colour that nothing else has; in the attributes of
the finished SVG the stand-in becomes ``var(--role)``, which the page's style sheet defines twice. Texts stay as they
are: a class may be called like a colour.

Orange stands for the spiking network and for warnings, blue for hybrids, from tap to tap nearer to full contrast, grey
for the teacher: told apart without red and green.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

ROLES: dict[str, tuple[str, str]] = {
    "page": ("#f4f6f8", "#0e1217"),
    "surface": ("#ffffff", "#171c23"),
    "ink": ("#17202b", "#e9edf2"),
    "muted": ("#52606f", "#a6b1be"),
    "line": ("#e2e7ec", "#2b333e"),
    "axis": ("#7f8b99", "#75818f"),
    "link": ("#0b5cad", "#7cb8f5"),
    "teacher": ("#4a5563", "#c4ccd6"),
    "student": ("#c2410c", "#ff9d66"),
    "frontier": ("#8fa3b8", "#66788c"),
}
"""Of each role the colour in light and in dark."""

TAPS = (("#3078ba", "#0a2c5e"), ("#4a8ed2", "#cfe5ff"))
"""First and last tap, in light and in dark."""

LEVELS: list[tuple[str, float, str, str]] = [
    ("under 1 %", 0.01, "#f7c9ae", "#6b3a1f"),
    ("1 to 5 %", 0.05, "#e6f0fa", "#18293c"),
    ("5 to 10 %", 0.1, "#c3dcf3", "#1d3d5e"),
    ("10 to 20 %", 0.2, "#94c1e8", "#245887"),
    ("20 to 30 %", 0.3, "#5fa0d8", "#3478b5"),
    ("30 to 50 %", 0.5, "#2f78b8", "#63a3da"),
    ("50 to 95 %", 0.95, "#114b86", "#aed4f8"),
    ("over 95 %", float("inf"), "#c2410c", "#ff9d66"),
]
"""Of firing rates: what it is called, where it ends, its colour in light and in dark. The ends are those of
`distill.report.SILENT` and `SATURATED`."""

_STAND_IN = 0xF10000


class Palette:
    """The colours of one report.

    Args:
        taps: how many hybrids there are.
        more: further roles, each with its colour in light and in dark.
    """

    def __init__(self, taps: int = 0, more: Mapping[str, tuple[str, str]] | None = None) -> None:
        self.colours = {**ROLES, **(more or {})}
        for i in range(taps):
            part = i / max(taps - 1, 1) if taps > 1 else 0.5
            self.colours[f"tap{i}"] = (_between(*TAPS[0], part), _between(*TAPS[1], part))
        for i, (_, _, light, dark) in enumerate(LEVELS):
            self.colours[f"level{i}"] = (light, dark)
            self.colours[f"on-level{i}"] = (_readable_on(light), _readable_on(dark))
        self._numbers = {role: number for number, role in enumerate(self.colours)}

    def __getitem__(self, role: str) -> str:
        """The stand-in of a role, for a drawing."""
        return f"#{_STAND_IN + self._numbers[role]:06x}"

    def variables(self, style: str) -> str:
        """The value of an attribute with variables in the place of the stand-ins."""
        roles = list(self.colours)
        return re.sub(r"#f1([0-9a-f]{4})\b", lambda found: f"var(--{roles[int(found[1], 16)]})", style)

    def css(self, dark: bool) -> str:
        """The definitions of all variables."""
        return " ".join(f"--{role}: {pair[dark]};" for role, pair in self.colours.items())


def level_of(rate: float) -> int:
    """The number of a firing rate's level."""
    return next(i for i, (_, end, _, _) in enumerate(LEVELS) if rate < end)


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, 1 to 21, as the Web Content Accessibility Guidelines define it."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [value / 255 for value in _channels(colour)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _readable_on(colour: str) -> str:
    return max("#17202b", "#ffffff", key=lambda ink: contrast(ink, colour))


def _between(first: str, last: str, part: float) -> str:
    pairs = zip(_channels(first), _channels(last), strict=True)
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in pairs)


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
