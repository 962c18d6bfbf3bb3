"""Energy against accuracy: every hybrid and T, and which of them no other beats in both."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from distill.html_report.chart import Chart, Missing, Table, both, log_axis, name_of, role_of
from distill.html_report.palette import Palette
from distill.html_report.run_data import STUDENT, TEACHER, Run
from distill.html_report.svg import Canvas
from distill.html_report.text import figures, is_number, percent, share

Row = dict[str, Any]
NONE = "\u2013"


def frontier(run: Run, palette: Palette) -> Chart | Missing:
    """Which network to take for an energy that one can afford."""
    key, title = "frontier", "Energy against accuracy"
    rows = [row for row in run.frontier if row["compute_uj"] > 0]
    if not rows:
        return Missing(key, title, _why_missing(run))
    best = pareto(rows)

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.axes(44, 40, 16, 14)
        energies, accuracies = [row["compute_uj"] for row in rows], [row["top1"] for row in rows]
        spread = max(max(energies) / min(energies), 1.5)
        log_axis(axes, "x", min(energies) / spread**0.08, max(energies) * spread ** (0.12 if wide else 0.16))
        pad = max(0.12 * (max(accuracies) - min(accuracies)), 1)
        axes.set_ylim(min(accuracies) - pad, min(max(accuracies) + pad, 102))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("energy of the arithmetic (\u00b5J an image)")
        axes.plot(
            [row["compute_uj"] for row in best], [row["top1"] for row in best], color=palette["frontier"], linewidth=7,
            alpha=0.3, solid_joinstyle="round",
        )  # fmt: skip
        for network in dict.fromkeys(row["network"] for row in rows):
            own = [row for row in rows if row["network"] == network]
            colour = palette[role_of(run, network)]
            shape = {TEACHER: "s", STUDENT: "D"}.get(network, "o")
            axes.plot([row["compute_uj"] for row in own], [row["top1"] for row in own], color=colour, linewidth=1)
            for row in own:
                face = colour if row in best else palette["surface"]
                (mark,) = axes.plot(
                    [row["compute_uj"]], [row["top1"]], shape, color=colour, markerfacecolor=face, markeredgewidth=1.8,
                    markersize=8, clip_on=False,
                )  # fmt: skip
                canvas.tip(mark, f"{_label(run, row)}: {percent(row['top1'])} at {figures(row['compute_uj'])} \u00b5J")
        _label_points(canvas, axes, run, rows, 11 if wide else 10)

    teacher = next((row for row in rows if row["network"] == TEACHER), None)
    said = "; ".join(
        f"{_label(run, row)}: {percent(row['top1'])} at {figures(row['compute_uj'])} \u00b5J" for row in rows
    )
    words = (
        f"Scatter chart of the top-1 accuracy against the energy of an image's arithmetic. {said}. No other is both "
        f"better and cheaper than: {', '.join(_label(run, row) for row in best)}."
    )
    header = [
        *(
            "Network",
            "T",
            "Top-1",
            "Arithmetic (\u00b5J an image)",
            "Of the teacher's",
            "Memory traffic (\u00b5J an image)",
        ),
        *("MACs an image", "ACs an image", "Layers with MACs", "On the frontier"),
    ]
    cells = [
        [
            name_of(row["network"]),
            NONE if row.get("timesteps") is None else str(row["timesteps"]),
            percent(row["top1"]),
            figures(row["compute_uj"]),
            NONE if teacher is None else share(row["compute_uj"] / teacher["compute_uj"]),
            *(figures(row.get(name)) for name in ("memory_uj", "macs", "acs")),
            share(row.get("mac_share_of_layers"), 0),
            "yes" if row in best else "no",
        ]
        for row in rows
    ]
    return Chart(
        key,
        title,
        "Top-1 in percent against the energy of the arithmetic, on a logarithmic scale; memory traffic is counted "
        "apart (see the numbers). Filled marks on the band: no other network is both better and cheaper.",
        words,
        both(key, words, palette, paint, 400, 360),
        Table(header, cells),
    )


def pareto(rows: list[Row]) -> list[Row]:
    """Those rows that no other beats, by rising energy: of less or equal energy and more accuracy, or the other way
    round."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["compute_uj"], -row["top1"])):
        if not kept or row["top1"] > kept[-1]["top1"]:
            kept.append(row)
    return kept


def best_networks(run: Run) -> Table | None:
    """The rows of the frontier, by rising energy; None where there is none."""
    rows = [row for row in run.frontier if row["compute_uj"] > 0]
    if not rows:
        return None
    teacher = next((row["compute_uj"] for row in rows if row["network"] == TEACHER), None)
    header = ["Network", "Top-1", "\u00b5J an image", "of teacher"]
    cells = [
        [
            _label(run, row),
            percent(row["top1"]),
            figures(row["compute_uj"]),
            NONE if teacher is None else share(row["compute_uj"] / teacher, 0),
        ]
        for row in pareto(rows)
    ]
    return Table(header, cells)


def _why_missing(run: Run) -> str:
    if not run.finished:
        return "Energy is estimated when the run has ended."
    if "frontier" not in run.summary:
        return "summary.json holds no energies: the run was made by a version that did not estimate them."
    return "summary.json holds no network with both an energy and an accuracy."


def _label(run: Run, row: Row) -> str:
    name = name_of(row["network"])
    return name if row.get("timesteps") is None else f"{name}, T = {row['timesteps']}"


def _label_points(canvas: Canvas, axes: Axes, run: Run, rows: list[Row], size: float) -> None:
    """Writes a network's name and T beside each mark where there is room; at further marks of a network T alone.

    Each network's own T (or its largest) comes first; a label that has no free place is left out: the numbers below
    the chart have all.
    """
    box = axes.get_window_extent()
    marks = [axes.transData.transform((row["compute_uj"], row["top1"])) for row in rows]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in marks]
    named: set[str] = set()

    def first(i: int) -> tuple[bool, bool, int]:
        row = rows[i]
        main = row.get("timesteps") in (None, run.timesteps)
        return (not main, row["network"] != STUDENT, -(row.get("timesteps") or 0))

    for i in sorted(range(len(rows)), key=first):
        row, (x, y) = rows[i], marks[i]
        network, t = row["network"], row.get("timesteps")
        whole = name_of(network, 18) + ("" if t is None else f" T{t}")
        for text in [whole] if network not in named else [f"T{t}", ""]:
            if text and (place := _free_place(x, y, 0.6 * size * len(text), size, box, taken)) is not None:
                left, bottom = place
                taken.append((left - 2, bottom - 1, left + 0.6 * size * len(text) + 2, bottom + size + 1))
                label = axes.annotate(
                    text, (left, bottom + size / 2), xycoords="figure points", va="center_baseline", fontsize=size,
                    color=canvas.palette[role_of(run, network)],
                    fontweight="bold" if network == STUDENT and t == run.timesteps else "normal",
                )  # fmt: skip
                canvas.halo(label)
                named.add(network)
                break


def _free_place(
    x: float, y: float, width: float, height: float, box: Any, taken: list[tuple[float, float, float, float]]
) -> tuple[float, float] | None:
    """Where beside a mark a text of this size lies on nothing else: its lower left corner."""
    gap = 10
    places = [
        (x + gap, y - height / 2),
        (x - gap - width, y - height / 2),
        (x - width / 2, y + gap),
        (x - width / 2, y - gap - height),
        (x + 7, y + 7),
        (x + 7, y - 7 - height),
        (x - 7 - width, y + 7),
        (x - 7 - width, y - 7 - height),
    ]
    for left, bottom in places:
        right, top = left + width, bottom + height
        inside = left >= box.x0 + 2 and right <= box.x1 + 14 and bottom >= box.y0 + 2 and top <= box.y1 + 12
        if inside and not any(left < x1 and right > x0 and bottom < y1 and top > y0 for x0, y0, x1, y1 in taken):
            return left, bottom
    return None


def energy_share(run: Run) -> float | None:
    """The energy of the student's arithmetic at its own T, as a share of the teacher's; None where it is not known."""
    found = {
        row["network"]: row["compute_uj"]
        for row in run.frontier
        if row["network"] == TEACHER or (row["network"] == STUDENT and row.get("timesteps") == run.timesteps)
    }
    if not is_number(found.get(STUDENT)) or not found.get(TEACHER):
        return None
    return found[STUDENT] / found[TEACHER]
