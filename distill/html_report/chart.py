"""What a chart of the report consists of, and what several of them draw alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from distill.html_report.palette import Palette
from distill.html_report.run_data import HYBRID, STUDENT, TEACHER, Run
from distill.html_report.svg import Canvas, drawn
from distill.html_report.text import abbreviated, shortened

WIDE, NARROW = 560, 340
"""Widths in pixels of the two drawings of a chart: for a column of a large window, and for a phone."""
LABEL = 11
"""Size of the type of labels in a drawing."""


@dataclass(frozen=True)
class Table:
    """The numbers of a chart, as texts."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Chart:
    """A chart in two sizes, with what it says in words and in numbers."""

    key: str
    title: str
    note: str
    """What is drawn, with units."""
    words: str
    """The text alternative."""
    drawings: list[str]
    """SVG elements."""
    table: Table
    legend: list[tuple[str, str]] = field(default_factory=list)
    """Roles of colours and what they mean, where the drawing does not say it beside the marks."""


@dataclass(frozen=True)
class Missing:
    """A chart that cannot be drawn."""

    key: str
    title: str
    reason: str


Paint = Callable[[Canvas, bool], None]
"""Draws on a canvas; told whether it is the wide one."""


def both(
    key: str, words: str, palette: Palette, paint: Paint, height: int, narrow_height: int | None = None
) -> list[str]:
    """The two drawings of a chart; the page shows the one that fits."""
    return [
        drawn(f"{key}-wide", words, WIDE, height, palette, lambda canvas: paint(canvas, True), "wide"),
        drawn(
            f"{key}-narrow", words, NARROW, narrow_height or height, palette, lambda c: paint(c, False), "narrow"
        ),
    ]  # fmt: skip


def name_of(network: str, most: int = 60) -> str:
    """A network's name for people; a hybrid's is its tap."""
    return "SNN" if network == STUDENT else shortened(network.removeprefix(HYBRID), most)


def full_name(run: Run, network: str) -> str:
    """A network's name that says what it is."""
    if network.startswith(HYBRID):
        return f"hybrid up to {name_of(network)}"
    return f"SNN, T = {run.timesteps}" if network == STUDENT and run.timesteps else name_of(network)


def role_of(run: Run, network: str) -> str:
    """The role of a network's colour."""
    if network.startswith(HYBRID):
        tap = network.removeprefix(HYBRID)
        return f"tap{run.taps.index(tap)}" if tap in run.taps else "muted"
    return network if network in (TEACHER, STUDENT) else "ink"


def spread_apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves places apart, as little as it takes for labels to be `gap` apart between `low` and `high`, in their order.

    Where there is no room for all, they are evenly spread.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    moved = list(places)
    floor = low
    for i in order:
        moved[i] = floor = max(moved[i], floor)
        floor += gap
    ceiling = high
    for i in reversed(order):
        moved[i] = ceiling = min(moved[i], ceiling)
        ceiling -= gap
    return moved


def label_ends(
    canvas: Canvas, axes: Axes, ends: Sequence[tuple[float, float, str, str]], room: float, size: float = LABEL
) -> None:
    """Names lines at their last points, to the right of the axes, with a thin leader where a label had to move.

    Args:
        ends: x, y, text and role of each line.
        room: pixels to the right of the axes.
    """
    height = axes.get_position().height * canvas.height
    width = axes.get_position().width * canvas.width
    points = [axes.transData.transform((x, y)) for x, y, _, _ in ends]
    left, bottom = axes.transAxes.transform((0, 0))
    wanted = [min(max(y - bottom, 0), height) for _, y in points]
    placed = spread_apart(wanted, size * 1.2, 0, height)
    names = abbreviated([text for _, _, text, _ in ends], int(room / (0.62 * size)))
    for (x, _), at, moved, text, (_, _, _, role) in zip(points, wanted, placed, names, ends, strict=True):
        colour = canvas.palette[role]
        if abs(moved - at) > 2 or x - left < width - 1:
            line = ([(x - left) / width, 1.005, 1 + 9 / width], [at / height, at / height, moved / height])
            axes.plot(*line, color=colour, linewidth=0.8, alpha=0.7, transform=axes.transAxes, clip_on=False)
        axes.text(
            1 + 12 / width, moved / height, text, color=colour, fontsize=size,
            va="center_baseline", transform=axes.transAxes,
        )  # fmt: skip


def count_axis(axes: Axes, last: int) -> None:
    """The x axis of epochs, from 1."""
    pad = max(0.04 * (last - 1), 0.1)
    axes.set_xlim(1 - (0.5 if last == 1 else pad), last + (0.5 if last == 1 else pad / 2))
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 1 else ""))
    axes.grid(axis="x", visible=False)


def log_axis(axes: Axes, which: str, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 times powers of ten (or at those powers alone)."""
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [(1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)]
    for digits in choices:
        ticks = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(ticks) >= 3:
            break
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def by_stage(run: Run, points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Places and values of a line over the epochs, with a gap where another stage begins: it trains something else."""
    stage_of = {epoch.number: epoch.stage for epoch in run.epochs}
    x: list[float] = []
    y: list[float] = []
    for i, (epoch, value) in enumerate(points):
        if i and stage_of.get(points[i - 1][0]) != stage_of.get(epoch):
            x.append(math.nan)
            y.append(math.nan)
        x.append(epoch)
        y.append(value)
    return x, y


def stage_lines(canvas: Canvas, axes: Axes, run: Run) -> None:
    """A thin line where a stage ends and, above, the names of the stages, where there are several."""
    stages = run.stages()
    if len(stages) < 2:
        return
    for name, first, last in stages:
        if first > 1:
            axes.axvline(first - 0.5, color=canvas.palette["axis"], linewidth=0.8, dashes=(2, 3))
        room = axes.get_position().width * canvas.width * (last - first + 1) / len(run.epochs)
        shown = shortened(short_stage(name), max(int(room / 5.4), 3))
        axes.text(
            (first + last) / 2, 1.01, shown, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
            fontsize=9, color=canvas.palette["muted"],
        )  # fmt: skip


def short_stage(stage: str) -> str:
    """The stage of a hybrid by its tap alone; the student's is the SNN's."""
    head, _, tap = stage.partition("_")
    return tap if head.startswith("stage") and tap else ("SNN" if stage == STUDENT else stage)
