"""Firing rates per layer over the epochs, as a map: a row for each layer, a column for each epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from distill.html_report.chart import Chart, Missing, Table, both, short_stage
from distill.html_report.palette import LEVELS, Palette, level_of
from distill.html_report.run_data import Run
from distill.html_report.svg import Canvas
from distill.html_report.text import abbreviated, is_number, share, shortened
from distill.report import rate_warnings

PREFIX = "firing_rate/"
COLUMNS = 40
"""The most epochs that are drawn; of more, every second, third, ... one and the last."""
NUMBERED = 8
"""With up to so many columns the wide drawing writes the rates in the cells."""
CELL = 18
"""Height in pixels."""


def firing_rates(run: Run, palette: Palette) -> Chart | Missing:
    """Which layers are silent, which fire all the time, and how that came about."""
    key, title = "firing", "Firing rate of each layer over the epochs"
    named = dict.fromkeys(k.removeprefix(PREFIX) for epoch in run.epochs for k in epoch.values if k.startswith(PREFIX))
    rates = {layer: found for layer in named if (found := dict(run.series(PREFIX + layer)))}  # of numbers alone
    layers = list(rates)
    if not layers:
        never = "No firing rate is a number." if named else "The run trained no spiking network."
        return Missing(key, title, never if run.finished or named else "No epoch of a spiking network has ended yet.")
    last = run.epochs[-1].number
    every = math.ceil(last / COLUMNS)
    shown = sorted({*range(every, last + 1, every), last})
    final = {layer: value for layer, value in run.summary.get("firing_rates", {}).items() if is_number(value)}

    def paint(canvas: Canvas, wide: bool) -> None:
        most = 26 if wide else 16
        names = abbreviated(layers, most)
        left = 14 + 6.1 * max(map(len, names))
        axes = canvas.axes(left, 38, 58 if final else 12, 26)
        width = (canvas.width - left - 70) / len(shown)
        gap = (1 if width > 16 else 0.4) / width
        numbered = len(shown) <= NUMBERED and width >= 30
        cells: dict[int, list[tuple[float, float]]] = {}
        for row, layer in enumerate(layers):
            for column, epoch in enumerate(shown):
                rate = rates[layer].get(epoch)
                if rate is None:
                    continue
                level = level_of(rate)
                cells.setdefault(level, []).append((column, row))
                if numbered:
                    axes.text(
                        column, row, f"{100 * rate:.1f}", ha="center", va="center_baseline", fontsize=10,
                        color=palette[f"on-level{level}"],
                    )  # fmt: skip
        for level, places in sorted(cells.items()):
            patch = PathPatch(_rectangles(places, gap), facecolor=palette[f"level{level}"], edgecolor="none")
            axes.add_patch(patch)
            canvas.tip(patch, LEVELS[level][0])
        axes.set_xlim(-0.5, len(shown) - 0.5)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.grid(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_yticks(range(len(layers)), names)
        axes.tick_params(axis="y", labelsize=10, labelcolor=palette["ink"])
        ticks = _ticks(len(shown), 8 if wide else 5)
        axes.set_xticks(ticks, [str(shown[i]) for i in ticks])
        axes.tick_params(axis="x", labelsize=10.5)
        axes.set_xlabel("epoch" if every == 1 else f"epoch (1 in {every} is drawn)")
        _stage_borders(canvas, axes, run, shown)
        if final:
            place = len(shown) - 0.5
            axes.annotate(
                "at the end", (1, 1), (58, 7), xycoords="axes fraction", textcoords="offset points", fontsize=9,
                ha="right", color=palette["muted"],
            )  # fmt: skip
            for row, layer in enumerate(layers):
                axes.annotate(
                    share(final.get(layer)), (place, row), (50, 0), textcoords="offset points", ha="right",
                    va="center_baseline", fontsize=10, annotation_clip=False,
                )  # fmt: skip

    words = _words(run, layers, rates, final)
    height = 64 + CELL * len(layers)
    header = ["Layer", *(f"epoch {epoch}" for epoch in shown), *(["at the end"] if final else [])]
    rows = [
        [layer, *(share(rates[layer].get(epoch)) for epoch in shown), *([share(final.get(layer))] if final else [])]
        for layer in layers
    ]
    return Chart(
        key,
        title,
        "Share of a layer's neurons that fire in a time step, in percent: while training, a mean over every 25th "
        "batch; at the end, over the evaluation images. Layers run from top to bottom; gaps are layers that did not.",
        words,
        both(key, words, palette, paint, height),
        Table(header, rows),
        legend=[(f"level{i}", name) for i, (name, *_) in enumerate(LEVELS)],
    )


def _rectangles(places: Sequence[tuple[float, float]], gap: float) -> Path:
    """Cells around these places, as one path: a drawing of thousands of elements would be slow and large."""
    vertices, codes = [], []
    for x, y in places:
        left, right, top, bottom = x - 0.5 + gap, x + 0.5 - gap, y - 0.44, y + 0.44
        vertices += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return Path(vertices, codes)


def _ticks(count: int, most: int) -> list[int]:
    step = math.ceil(count / most)
    return [count - 1 - i for i in range(0, count, step)][::-1]


def _stage_borders(canvas: Canvas, axes: Axes, run: Run, shown: list[int]) -> None:
    """The stages above their columns."""
    stages = run.stages()
    if len(stages) < 2:
        return
    width = axes.get_position().width * canvas.width / len(shown)
    for name, first, last in stages:
        columns = [i for i, epoch in enumerate(shown) if first <= epoch <= last]
        if not columns:
            continue
        if columns[0] > 0:
            axes.axvline(columns[0] - 0.5, color=canvas.palette["axis"], linewidth=1)
        text = shortened(short_stage(name), max(int(width * len(columns) / 5.4), 3))
        middle = (columns[0] + columns[-1]) / 2
        axes.annotate(
            text, (middle, -0.5), (0, 6), textcoords="offset points", ha="center", fontsize=9,
            color=canvas.palette["muted"],
        )  # fmt: skip


def _words(run: Run, layers: list[str], rates: dict[str, dict[int, float]], final: dict[str, float]) -> str:
    last = final or {layer: list(values.values())[-1] for layer, values in rates.items() if values}
    low, high = min(last, key=lambda n: last[n]), max(last, key=lambda n: last[n])
    mean = sum(last.values()) / len(last)
    when = "At the end, on the evaluation images," if final else "In the last epoch"
    problems = rate_warnings(last)
    said = ": " + "; ".join(problems) if problems else ": none is almost silent and none fires almost always"
    return (
        f"Map of the firing rates of {len(layers)} layers over {len(run.epochs)} epochs. {when} the mean over the "
        f"layers is {share(mean)}, the lowest {share(last[low])} ({low}), the highest {share(last[high])} ({high})"
        f"{said}."
    )
