"""The plots of the study: accuracy over epochs, and against the time of training, as SVG for light and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.study.cells import machine_of
from benchmarks.study.comparing import by_row
from benchmarks.study.records import Record
from benchmarks.study.rows import BEST, HYBRIDS, ROWS
from distill.html_report.chart import count_axis, label_ends
from distill.html_report.palette import Palette
from distill.html_report.svg import Canvas, drawn

WIDTH, HEIGHT = 760, 420
ROOM = 150
"""Pixels for the names of the lines, to the right of the axes."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
HYBRID, LABELS, LOGITS, THROUGH_TIME = "hybrid-row", "labels-row", "logits-row", "through-time-row"
COLOURS = {
    HYBRID: ("#1d63a8", "#7db9f0"),
    LABELS: ("#b45309", "#f5a962"),
    LOGITS: ("#0f766e", "#5cc8b8"),
    THROUGH_TIME: ("#7c3aed", "#b79df5"),
}
"""Of what a row learns from, in light and in dark; the analogue network is as grey as its copy that teaches."""
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (2, 2), (6, 2, 2, 2), (1, 1), (8, 2, 1, 2, 1, 2), (4, 4))
"""Of the rows of one colour, in their order."""

Line = list[tuple[float, float]]
"""Points (x, top-1 in percent)."""


def over_epochs(records: Sequence[Record]) -> str | None:
    """Accuracy at the end of each epoch, the mean over the seeds; None where no row has epochs."""
    found = {name: _mean_line(each, lambda p: p[0]) for name, each in by_row(_curved(records)).items()}
    return _plot("epochs", "top-1 over the epochs", "epoch", found, records) if found else None


def over_time(records: Sequence[Record]) -> str | None:
    """The same against minutes of training, of the machine that has most of the rows."""
    curved = _curved(records)
    machines = [machine_of(record) for record in curved]
    if not machines:
        return None
    machine = max(dict.fromkeys(machines), key=machines.count)
    own = [record for record in curved if machine_of(record) == machine]
    found = {name: _mean_line(each, lambda p: p[2] / 60) for name, each in by_row(own).items()}
    return _plot("time", "top-1 against training time", f"minutes of training ({machine})", found, records)


def _curved(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["curve"] and record["row"] in ROWS]


def _mean_line(records: Sequence[Record], x: Callable[[Sequence[float]], float]) -> Line:
    """Of several seeds, epoch by epoch."""
    points = zip(*(record["curve"] for record in records), strict=True)
    count = len(records)
    return [(sum(x(p) for p in each) / count, sum(p[1] for p in each) / count) for each in points]


def _plot(key: str, what: str, axis: str, lines: Mapping[str, Line], records: Sequence[Record]) -> str:
    palette = Palette(more=COLOURS)
    teachers = [r["teacher_top1"] for r in records if r["teacher_top1"] is not None]
    styles = {name: _style(name) for name in lines}

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes(48, 44, ROOM, 14)
        for name, line in lines.items():
            role, dashes = styles[name]
            x, y = zip(*line, strict=True)
            (drawn_line,) = axes.plot(
                x, y, color=palette[role], linewidth=3 if name == BEST else 1.8, marker="o", markersize=4
            )
            if dashes:
                drawn_line.set_dashes(dashes)
                drawn_line.set_dash_capstyle("butt")
        if teachers:
            axes.axhline(teachers[-1], color=palette["teacher"], linewidth=1, dashes=(4, 3))
            axes.annotate(
                "teacher", (0, teachers[-1]), (4, -13), xycoords=("axes fraction", "data"), textcoords="offset points",
                fontsize=11, color=palette["teacher"],
            )  # fmt: skip
        _limits(axes, key, lines)
        axes.set_xlabel(axis)
        axes.set_ylabel("top-1 (%)")
        axes.yaxis.set_major_locator(MaxNLocator(7))
        ends = [(*line[-1], ROWS[name].label, styles[name][0]) for name, line in lines.items()]
        label_ends(canvas, axes, ends, room=ROOM - 14)

    last = ", ".join(f"{ROWS[name].label} {line[-1][1]:.2f}" for name, line in lines.items())
    svg = drawn(f"study-{key}", f"Chart of {what}. At the end: {last}.", WIDTH, HEIGHT, palette, paint, "study")
    return _alone(svg, palette)


def _limits(axes: Axes, key: str, lines: Mapping[str, Line]) -> None:
    if key == "epochs":
        count_axis(axes, round(max(line[-1][0] for line in lines.values())))
    else:
        axes.set_xlim(0, 1.02 * max(line[-1][0] for line in lines.values()))
        axes.grid(axis="x", visible=False)


def _style(name: str) -> tuple[str, tuple[float, ...]]:
    """A colour's role and dashes for a row, the same in every plot."""
    alike = [other for other in ROWS if _role(other) == _role(name)]
    return _role(name), DASHES[alike.index(name) % len(DASHES)]


def _role(name: str) -> str:
    if name in HYBRIDS or name.startswith(f"{BEST}_"):
        return HYBRID
    return {"kd": LOGITS, "bptt": THROUGH_TIME, "tet": THROUGH_TIME, "ann": "teacher"}.get(name, LABELS)


def _alone(svg: str, palette: Palette) -> str:
    """A drawing for a page as a file of its own, with the colours and the type that a page would give it."""
    used = {role for role in palette.colours if f"var(--{role})" in svg}

    def variables(dark: bool) -> str:
        return " ".join(f"--{role}: {pair[dark]};" for role, pair in palette.colours.items() if role in used)

    style = (
        f"<style>svg {{ font-family: {FONT}; {variables(False)} }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {variables(True)} }} }}</style>"
    )
    start = svg.index(">") + 1
    return svg[:start] + style + svg[start:] + "\n"
