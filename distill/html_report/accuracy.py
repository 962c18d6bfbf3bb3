"""Charts of top-1 accuracy: by tap, by the number of time steps, over the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from distill.html_report.chart import (
    LABEL,
    Chart,
    Missing,
    Table,
    both,
    by_stage,
    count_axis,
    full_name,
    label_ends,
    name_of,
    role_of,
    short_stage,
    stage_lines,
)
from distill.html_report.palette import Palette
from distill.html_report.run_data import HYBRID, STUDENT, TEACHER, Run
from distill.html_report.svg import Canvas
from distill.html_report.text import abbreviated, is_number, percent

NUMBERED = 6
"""Up to so many T have their accuracy written beside the mark; of more, the first, the last and the network's own."""


def by_tap(run: Run, palette: Palette) -> Chart | Missing:
    """How much accuracy is left the further the spiking part reaches."""
    key, title = "by-tap", "Accuracy by tap"
    found = run.top1()
    if len(found) < 2:
        alone = "The run has one network only: there is nothing to compare."
        return Missing(key, title, alone if found else "No epoch has ended yet.")
    names = {network: full_name(run, network) for network in found}
    latest = "" if run.finished else " in the last epoch"

    def paint(canvas: Canvas, wide: bool) -> None:
        most = 24 if wide else 15
        taps = dict(zip(run.taps, abbreviated(run.taps, most - len("up to ")), strict=True))
        labels = [
            f"up to {taps[network.removeprefix(HYBRID)]}" if network.startswith(HYBRID) else name
            for network, name in names.items()
        ]
        left = 16 + 7 * max(map(len, labels))
        axes = canvas.axes(left, 36, 64, 8)
        low, high = _range(list(found.values()))
        rows = list(range(len(found)))[::-1]
        if TEACHER in found:
            axes.axvline(found[TEACHER], color=palette["teacher"], linewidth=1, dashes=(4, 3))
        for row, (network, value) in zip(rows, found.items(), strict=True):
            role = role_of(run, network)
            axes.axhline(row, color=palette["line"], linewidth=1, zorder=0.5)
            shape = {TEACHER: "s", STUDENT: "D"}.get(network, "o")
            (mark,) = axes.plot([value], [row], shape, color=palette[role], markersize=9, clip_on=False)
            canvas.tip(mark, f"{names[network]}: {percent(value)}")
            text = axes.annotate(
                f"{value:.2f}", (value, row), (11, 0), textcoords="offset points", va="center_baseline",
                fontweight="bold" if network == STUDENT else "normal", annotation_clip=False,
            )  # fmt: skip
            canvas.halo(text)
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.set_xlim(low, high)
        axes.set_yticks(rows, labels)
        axes.tick_params(axis="y", labelcolor=palette["ink"])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5 if wide else 3))
        axes.set_xlabel("top-1 (%)")

    agreement = {
        **{HYBRID + tap: value for tap, value in run.summary.get("hybrid_agreement", {}).items()},
        STUDENT: run.summary.get("student_agreement"),
    }
    rows = [
        [names[network], percent(value), percent(agreement.get(network)), _points(value, found.get(TEACHER))]
        for network, value in found.items()
    ]
    words = ", ".join(f"{names[network]} {percent(value)}" for network, value in found.items())
    return Chart(
        key,
        title,
        f"Top-1 on the evaluation images{latest}, in percent. A hybrid spikes up to its tap; behind it the teacher's "
        "layers follow. The axis does not start at zero."
        if run.taps
        else f"Top-1 on the evaluation images{latest}, in percent. The axis does not start at zero.",
        f"Chart of the top-1 accuracy{latest}: {words}.",
        both(key, f"Chart of the top-1 accuracy{latest}: {words}.", palette, paint, 52 + 34 * len(found)),
        Table(["Network", "Top-1", "As the teacher predicts", "Against the teacher (points)"], rows),
    )


def by_timesteps(run: Run, palette: Palette) -> Chart | Missing:
    """Accuracy against T."""
    key, title = "by-timesteps", "Accuracy by time steps"
    lines = _lines_by_timesteps(run)
    if not lines:
        never = run.finished and STUDENT not in run.top1()
        later = "Accuracies at several T are measured when the run has ended."
        return Missing(key, title, "The run trained no spiking network." if never else later)
    steps = sorted({t for line in lines.values() for t in line})
    if len(steps) < 2:
        (value,) = next(iter(lines.values())).values()
        found = f"The network was evaluated at its own T = {steps[0]} only: {percent(value)}"
        return Missing(key, title, f"{found}. Other T: scripts/evaluate.py.")
    teacher = run.summary.get("teacher_top1")

    def paint(canvas: Canvas, wide: bool) -> None:
        room = 80 if wide else 66
        axes = canvas.axes(40, 40, room, 12)
        values = [value for line in lines.values() for value in line.values()]
        axes.set_ylim(*_range([*values, teacher] if is_number(teacher) else values))
        axes.set_xlim(math.log2(steps[0]) - 0.15, math.log2(steps[-1]) + 0.15)
        ends = []
        for network, line in lines.items():
            role, main = role_of(run, network), network == STUDENT
            places = [math.log2(t) for t in line]
            axes.plot(places, list(line.values()), color=palette[role], linewidth=2.5 if main else 1.5)
            for place, (t, value) in zip(places, line.items(), strict=True):
                own = t == run.timesteps
                face = palette[role] if own else palette["surface"]
                (mark,) = axes.plot(
                    [place], [value], "D" if main else "o", color=palette[role], markerfacecolor=face,
                    markersize=8 if main else 6, markeredgewidth=2, clip_on=False,
                )  # fmt: skip
                canvas.tip(mark, f"{full_name(run, network)}, T = {t}: {percent(value)}")
                others = [line[t] for name, line in lines.items() if name != network and t in line]
                written = len(line) <= NUMBERED or t in (steps[0], run.timesteps, steps[-1])
                if main and written and (offset := _free_side(axes, value, [*others, teacher])) is not None:
                    text = axes.annotate(
                        f"{value:.2f}", (place, value), (0, offset), textcoords="offset points",
                        ha="center", fontweight="bold" if own else "normal", fontsize=LABEL,
                    )  # fmt: skip
                    canvas.halo(text)
            ends.append((places[-1], list(line.values())[-1], name_of(network), role))
        if is_number(teacher):
            axes.axhline(teacher, color=palette["teacher"], linewidth=1.5, dashes=(4, 3))
            ends.append((axes.get_xlim()[1], teacher, "teacher", TEACHER))
        label_ends(canvas, axes, ends, room - 14)
        axes.xaxis.set_major_locator(FixedLocator([math.log2(t) for t in _sparse(steps)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: str(round(2**place))))
        axes.set_xlabel("time steps T")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x", visible=False)

    others = " and the hybrids'" if len(lines) > 1 else ""
    said = "; ".join(
        f"{full_name(run, network)}: " + ", ".join(f"{percent(value)} at T = {t}" for t, value in line.items())
        for network, line in lines.items()
    )
    against = f" The teacher, without time steps: {percent(teacher)}." if is_number(teacher) else ""
    words = f"Line chart of the top-1 accuracy against the number of time steps. {said}.{against}"
    rows = [
        [full_name(run, network), str(t), percent(value), _points(value, teacher)]
        for network, line in lines.items()
        for t, value in line.items()
    ]
    return Chart(
        key,
        title,
        f"The SNN's{others} top-1 in percent; T on a logarithmic scale. A filled mark is the T of the training, "
        "whose batch-norm statistics all others use.",
        words,
        both(key, words, palette, paint, 300, 280),
        Table(["Network", "T", "Top-1", "Against the teacher (points)"], rows),
    )


def over_epochs(run: Run, palette: Palette) -> Chart | Missing:
    """Accuracy after each epoch."""
    key, title = "over-epochs", "Accuracy over the epochs"
    keys = {HYBRID + tap: f"hybrid_top1/{tap}" for tap in run.taps} | {STUDENT: "student_top1"}
    lines = {network: series for network, name in keys.items() if (series := run.series(name))}
    teacher = None
    if lines:
        teacher = next((v for _, v in run.series("teacher_top1")), None)
    elif series := run.series("teacher_top1"):
        lines = {TEACHER: series}
    if not lines:
        return Missing(key, title, "No epoch has ended yet.")
    last = run.epochs[-1].number

    def paint(canvas: Canvas, wide: bool) -> None:
        room = 80 if wide else 66
        axes = canvas.axes(40, 40, room, 20)
        values = [value for series in lines.values() for _, value in series]
        axes.set_ylim(*_range([*values, teacher] if teacher is not None else values))
        count_axis(axes, last)
        stage_lines(canvas, axes, run)
        ends = []
        for network, series in lines.items():
            role = role_of(run, network)
            epoch, accuracy = series[-1]
            shape = {TEACHER: "s", STUDENT: "D"}.get(network, "o")
            marks = shape if len(series) <= 12 else ""
            width = 2.5 if network == STUDENT else 1.8
            (line,) = axes.plot(
                *by_stage(run, series), marker=marks, linestyle="-", color=palette[role], linewidth=width, markersize=5,
                clip_on=False,
            )  # fmt: skip
            canvas.tip(line, f"{full_name(run, network)}: {percent(accuracy)} after epoch {epoch}")
            ends.append((float(epoch), accuracy, name_of(network), role))
        if teacher is not None:
            axes.axhline(teacher, color=palette["teacher"], linewidth=1.5, dashes=(4, 3))
            ends.append((axes.get_xlim()[1], teacher, "teacher", TEACHER))
        label_ends(canvas, axes, ends, room - 14)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("epoch")

    said = "; ".join(f"{full_name(run, network)} {_course(series)}" for network, series in lines.items())
    fixed = "" if teacher is None else f" The teacher stays at {percent(teacher)}."
    words = f"Line chart of the top-1 accuracy after each of {last} epochs. {said}.{fixed}"
    header = ["Epoch", "Stage", *(full_name(run, network) for network in lines)]
    by_epoch = {network: dict(series) for network, series in lines.items()}
    rows = [
        [str(e.number), short_stage(e.stage), *(percent(by_epoch[network].get(e.number)) for network in lines)]
        for e in run.epochs
    ]
    return Chart(
        key,
        title,
        "Top-1 on the evaluation images after each epoch, in percent.",
        words,
        both(key, words, palette, paint, 300, 280),
        Table(header, rows),
    )


def _lines_by_timesteps(run: Run) -> dict[str, dict[int, float]]:
    """Top-1 by T of the student and of those hybrids that were evaluated at several T."""
    found: dict[str, dict[int, float]] = {}
    for row in run.frontier:
        if is_number(row.get("timesteps")) and row.get("network") != TEACHER:
            found.setdefault(str(row["network"]), {})[int(row["timesteps"])] = row["top1"]
    student = {
        int(t): value for t, value in run.summary.get("student_top1_by_timesteps", {}).items() if is_number(value)
    }
    hybrids = {name: dict(sorted(line.items())) for name, line in found.items() if name != STUDENT and len(line) > 1}
    line = dict(sorted((student or found.get(STUDENT, {})).items()))
    return hybrids | ({STUDENT: line} if line else {})


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis of accuracies: some room below and above, within 0 to 100 but for a little."""
    low, high = min(values), max(values)
    pad = max(0.12 * (high - low), 1.0)
    return max(low - pad, 0), min(high + pad, 101)


def _free_side(axes: Axes, value: float, others: Sequence[float | None]) -> int | None:
    """Where a number has room over or under its mark: the offset of its baseline in pixels; None if nowhere."""

    def height(accuracy: float) -> float:
        return axes.transData.transform((0, accuracy))[1]

    gaps = [height(other) - height(value) for other in others if is_number(other)]
    floor = axes.get_window_extent().y0
    if not any(-6 < gap < 28 for gap in gaps):
        return 11
    return -20 if height(value) - floor > 26 and not any(-28 < gap < 6 for gap in gaps) else None


def _sparse(steps: list[int]) -> list[int]:
    """Of many T those to write at the axis: no two closer than a quarter of an octave."""
    kept = steps[:1]
    for t in steps[1:]:
        if math.log2(t / kept[-1]) >= max(0.25, math.log2(steps[-1] / steps[0]) / 12):
            kept.append(t)
    return kept


def _points(value: float, teacher: float | None) -> str:
    return f"{value - teacher:+.2f}" if is_number(teacher) else "\u2013"


def _course(series: list[tuple[int, float]]) -> str:
    """A line in words."""
    best = max(series, key=lambda pair: pair[1])
    if len(series) == 1:
        return f"has {percent(series[0][1])} after epoch {series[0][0]}"
    return (
        f"goes from {percent(series[0][1])} (epoch {series[0][0]}) to {percent(series[-1][1])} (epoch "
        f"{series[-1][0]}), at best {percent(best[1])} (epoch {best[0]})"
    )
