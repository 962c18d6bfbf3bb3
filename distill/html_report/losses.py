"""Loss curves, one panel for each part of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from distill.html_report.chart import (
    Chart,
    Missing,
    Table,
    both,
    by_stage,
    count_axis,
    full_name,
    label_ends,
    log_axis,
    name_of,
    role_of,
    short_stage,
    stage_lines,
)
from distill.html_report.palette import Palette
from distill.html_report.run_data import HYBRID, STUDENT, TEACHER, Epoch, Run
from distill.html_report.svg import Canvas
from distill.html_report.text import figures, is_number

PANELS = {
    "total": "whole loss, weighted (nats)",
    "ce": "cross-entropy with the labels (nats)",
    "kd": "divergence from the teacher (nats)",
    "feature": "distance of features (no unit)",
    "mse": "TET's regulariser (no unit)",
}
"""Parts of the loss by what they measure, with titles; a part that is none of them has a panel by its own name."""
WHOLE = "sum"
"""In the place of a network: the loss of student and hybrids together."""
PANEL = 178
"""Height in pixels."""


@dataclass(frozen=True)
class _Line:
    key: str
    """In the metrics."""
    network: str
    points: list[tuple[int, float]]


def losses(run: Run, palette: Palette) -> Chart | Missing:
    """Each part of the training loss over the epochs."""
    key, title = "losses", "Loss by part"
    panels = _panels(run)
    if not panels:
        return Missing(key, title, "No epoch has ended yet.")

    def paint(canvas: Canvas, wide: bool) -> None:
        columns = 2 if wide and len(panels) > 1 else 1
        width = canvas.width / columns
        for number, (name, lines) in enumerate(panels.items()):
            row, column = divmod(number, columns)
            top = row * PANEL
            left = column * width
            axes = canvas.axes(left + 42, canvas.height - top - PANEL + 38, canvas.width - left - width + 64, top + 32)
            count = len(run.teacher_epochs) if name == TEACHER and run.teacher_epochs else len(run.epochs)
            _paint_panel(canvas, axes, run, name, lines, count)

    said = "; ".join(
        f"{_title(name)}: " + ", ".join(f"{full_name(run, line.network)} {_ends(line.points)}" for line in lines)
        for name, lines in panels.items()
    )
    words = f"Line charts of the training loss by part, over {len(run.epochs)} epochs. {said}."
    return Chart(
        key,
        title,
        "Means over the images of an epoch, before weights, in nats an image unless said otherwise. Logarithmic where "
        "values span a factor of more than five.",
        words,
        both(key, words, palette, paint, PANEL * math.ceil(len(panels) / 2), PANEL * len(panels)),
        _table(run, panels),
    )


def _paint_panel(canvas: Canvas, axes: Axes, run: Run, name: str, lines: list[_Line], count: int) -> None:
    axes.set_title(_title(name), loc="left", fontsize=11, color=canvas.palette["ink"], pad=14 if _staged(run) else 8)
    values = [value for line in lines for _, value in line.points]
    low, high = min(values), max(values)
    count_axis(axes, count)
    if low > 0 and high / low > 5:
        log_axis(axes, "y", low / 1.25, high * 1.25)
    else:
        pad = 0.1 * (high - low) or 0.1 * abs(high) or 1
        axes.set_ylim(low - pad, high + pad)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    if name != TEACHER:
        stage_lines(canvas, axes, run)
    ends = []
    for line in lines:
        epoch, value = line.points[-1]
        role = role_of(run, line.network)
        places = [*zip(*line.points, strict=True)] if name == TEACHER else by_stage(run, line.points)
        (drawn,) = axes.plot(
            *places, marker="o" if len(line.points) <= 12 else "", linestyle="-", color=canvas.palette[role],
            linewidth=2.2 if line.network == STUDENT else 1.6, markersize=4, clip_on=False,
        )  # fmt: skip
        canvas.tip(drawn, f"{full_name(run, line.network)}: {figures(value)} in epoch {epoch}")
        ends.append((epoch, value, name_of(line.network), role))
    label_ends(canvas, axes, ends, 50, 10)
    axes.tick_params(labelsize=10.5)
    axes.set_xlabel("epoch", fontsize=10.5, labelpad=2)


def _panels(run: Run) -> dict[str, list[_Line]]:
    """The lines of each panel, in the order of `PANELS`."""
    found: dict[str, list[_Line]] = {}
    names = dict.fromkeys(key for epoch in run.epochs for key in epoch.values if key.startswith("loss/"))
    alone = not any("student" in key or "hybrid" in key for key in names)
    for key in names:
        part, _, tap = key.removeprefix("loss/").partition("/")
        kind = part.rpartition("_")[2]
        network = HYBRID + tap if tap else STUDENT
        if run.epochs[0].stage == TEACHER:
            network = TEACHER
        elif key == "loss/total" and not alone:
            network = WHOLE
        if points := run.series(key):
            found.setdefault(kind if kind in PANELS else part, []).append(_Line(key, network, points))
    if set(found) == {"total"} and alone:  # a loss of one part: total is the cross-entropy
        found = {"ce": found["total"]}
    if points := _series(run.teacher_epochs):
        found[TEACHER] = [_Line("loss/total", TEACHER, points)]
    order = [*PANELS, *(name for name in found if name not in PANELS)]
    return {name: found[name] for name in order if name in found}


def _series(epochs: list[Epoch]) -> list[tuple[int, float]]:
    pairs = [(epoch.number, epoch.values.get("loss/total")) for epoch in epochs]
    return [(number, float(value)) for number, value in pairs if is_number(value)]


def _title(panel: str) -> str:
    return {**PANELS, TEACHER: "teacher's own training (nats)"}.get(panel, panel)


def _staged(run: Run) -> bool:
    return len(run.stages()) > 1


def _ends(points: list[tuple[int, float]]) -> str:
    if len(points) == 1:
        return f"{figures(points[0][1])} in epoch {points[0][0]}"
    return f"from {figures(points[0][1])} to {figures(points[-1][1])}"


def _table(run: Run, panels: dict[str, list[_Line]]) -> Table:
    lines = [line for name, of_panel in panels.items() if name != TEACHER for line in of_panel]
    header = ["Stage", "Epoch", *(line.key.removeprefix("loss/") for line in lines), "learning rate"]
    by_epoch = [dict(line.points) for line in lines]
    rows = [
        ["teacher", str(epoch.number), figures(epoch.values.get("loss/total")), *[""] * (len(lines) - 1), _rate(epoch)]
        for epoch in run.teacher_epochs
    ]
    rows += [
        [short_stage(e.stage), str(e.number), *(figures(values.get(e.number)) for values in by_epoch), _rate(e)]
        for e in run.epochs
    ]
    return Table(header, rows)


def _rate(epoch: Epoch) -> str:
    return figures(epoch.values.get("lr"))
