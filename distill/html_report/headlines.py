"""What the page says first: the figures of the run, and what to know about them."""

from __future__ import annotations

from dataclasses import dataclass

from distill.html_report.chart import short_stage
from distill.html_report.frontier import energy_share
from distill.html_report.run_data import STUDENT, TEACHER, Run
from distill.html_report.text import SPACE, duration, figures, is_number, percent
from distill.report import GRADIENTS, rate_warnings


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    value: str
    unit: str
    name: str
    detail: str = ""
    main: bool = False
    """Whether it is the number that the run was for."""


def tiles(run: Run) -> list[Tile]:
    """The headline numbers that the run has."""
    found, top1, made = run.summary, run.top1(), []
    latest = "" if run.finished else "last epoch"
    if STUDENT in top1:
        name = f"SNN top-1 at T{SPACE}={SPACE}{run.timesteps}"
        made.append(Tile(f"{top1[STUDENT]:.2f}", "%", name, latest, main=True))
    if TEACHER in top1:
        made.append(Tile(f"{top1[TEACHER]:.2f}", "%", "teacher top-1", "" if STUDENT in top1 else latest))
    if STUDENT in top1 and TEACHER in top1:
        lost = top1[TEACHER] - top1[STUDENT]
        made.append(
            Tile(f"{abs(lost):.2f}", "points", "lost against the teacher" if lost >= 0 else "above the teacher")
        )
    if is_number(rate := found.get("mean_firing_rate")):
        made.append(Tile(f"{100 * rate:.1f}", "%", "mean firing rate", "of the neurons in a step, mean over layers"))
    if (part := energy_share(run)) is not None:
        value = f"{100 * part:.{0 if part >= 0.1 else 1}f}"
        made.append(Tile(value, "%", "of the teacher's energy", "arithmetic, estimated"))
    confidence = found.get("confidence")
    if isinstance(confidence, dict) and is_number(confidence.get("ece")):
        made.append(Tile(figures(confidence["ece"]), "", "calibration error", "expected, 0 is best"))
    return made


def facts(run: Run) -> list[tuple[str, str]]:
    """Name and value of what one wants to know of a run at a glance."""
    config, summary = run.config, run.summary
    student = config.get("student.name")
    algorithm = summary.get("algorithm", config.get("student.algorithm"))
    data = config.get("data.name")
    root = config.get("data.root")
    epochs = len(run.epochs)
    made = [
        ("Teacher", config.get("teacher.name")),
        ("Student", None if student is None else f"{student}, T = {run.timesteps}"),
        ("Gradient", None if algorithm is None else GRADIENTS.get(algorithm, algorithm)),
        ("Schedule", summary.get("schedule", config.get("schedule.name"))),
        ("Data", None if data is None else f"{data} ({root})" if root else data),
        ("Backward pass", _backward(run.latest("backward/"))),
        ("Parameters", f"{summary['parameters']:,}" if is_number(summary.get("parameters")) else None),
        ("Epochs", f"{epochs}" + (f", after {len(run.teacher_epochs)} of the teacher" if run.teacher_epochs else "")),
        ("Run time", duration(summary["seconds"]) if is_number(summary.get("seconds")) else None),
        ("Training speed", _speed(summary.get("images_per_second"))),
        ("Agreement with the teacher", _agreement(summary.get("student_agreement"))),
    ]
    return [(name, str(value)) for name, value in made if value is not None]


def notes(run: Run) -> list[str]:
    """What a reader must know about the figures."""
    found = []
    if not run.finished:
        last = run.epochs[-1] if run.epochs else None
        so_far = "no epoch has ended"
        if last is not None:
            so_far = f"the last epoch is number {last.values.get('epoch')} of stage {short_stage(last.stage)!r}"
        found.append(f"This run has not ended: {so_far}. Accuracies are those of the last epoch that has them.")
    rates = {layer: rate for layer, rate in run.summary.get("firing_rates", {}).items() if is_number(rate)}
    found += [line[0].upper() + line[1:] + "." for line in rate_warnings(rates)]
    if skipped := run.summary.get("skipped_images"):
        found.append(f"{len(skipped)} images could not be read and were left out; summary.json names them.")
    bad = sum(epoch.values.get("skipped_steps", 0) for epoch in [*run.teacher_epochs, *run.epochs])
    if bad:
        found.append(f"{bad} steps were skipped because the loss or its gradient was no finite number.")
    if run.earlier_configs:
        found.append("The run was resumed with another configuration: the changes are listed under Configuration.")
    return found


def _backward(found: dict[str, float]) -> str | None:
    """Of the last epoch: how sparse backward spikes were, and how the gradient at the equilibrium was solved for."""
    rates = [value for name, value in found.items() if name.startswith("firing_rate/")]
    solved = {name.partition("/")[0]: value for name, value in found.items()}
    parts = []
    if rates:
        parts.append(f"{100 * sum(rates) / len(rates):.1f} % of the neurons fire in a step")
    if {"iterations", "residual", "converged"} <= solved.keys():
        parts.append(f"{figures(solved['iterations'])} {'steps' if rates else 'iterations'}")
        parts.append(f"residual {figures(solved['residual'])}")
        parts.append(f"solved in {100 * solved['converged']:.0f} % of the batches")
    return ", ".join(parts) or None


def _speed(value: object) -> str | None:
    return f"{figures(value)} images/s" if is_number(value) else None


def _agreement(value: object) -> str | None:
    return percent(value) if is_number(value) else None
