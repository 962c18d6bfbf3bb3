"""What lies in the folder of a run, read for the report; what is not there yet is empty."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill.config_changes import flatten
from distill.html_report.text import cleaned, is_number
from distill.runs import CONFIG, SUMMARY, RunFolder
from distill.spike_examples import RASTER

TEACHER_STAGE = "teacher"
TEACHER, STUDENT, HYBRID = "teacher", "student", "hybrid/"
"""Names of networks; a hybrid's tap follows."""


@dataclass(frozen=True)
class Epoch:
    """A line of the metrics."""

    number: int
    """From 1, over all stages of the spiking network."""
    stage: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run, finished or not."""

    name: str
    config: dict[str, Any]
    """Resolved; with dotted names."""
    config_text: str
    earlier_configs: list[dict[str, Any]]
    """Those of the run before it was resumed with another, the first first; with dotted names."""
    epochs: list[Epoch]
    """Of the spiking network; of the teacher, where nothing else was trained."""
    teacher_epochs: list[Epoch]
    summary: dict[str, Any]
    """Empty if the run has not ended."""
    raster: dict[str, Any]
    """Empty if there is none."""

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def timesteps(self) -> int | None:
        """T of the student; None for a run of a teacher alone."""
        found = self.summary.get("timesteps", self.config.get("student.timesteps"))
        return int(found) if is_number(found) else None

    @property
    def taps(self) -> list[str]:
        """Of the hybrids, in their order."""
        names = dict.fromkeys(self.summary.get("hybrid_top1", {}))
        for epoch in self.epochs:
            for key in epoch.values:
                for prefix in ("hybrid_top1/", "loss/hybrid_ce/"):
                    if key.startswith(prefix):
                        names.setdefault(key.removeprefix(prefix))
        return list(names)

    @property
    def frontier(self) -> list[dict[str, Any]]:
        """Energy and accuracy of networks and T; the rows that have both."""
        rows = self.summary.get("frontier", [])
        return [row for row in rows if is_number(row.get("compute_uj")) and is_number(row.get("top1"))]

    def top1(self) -> dict[str, float]:
        """Top-1 in percent of teacher, hybrids and student: those of the summary, else of each the last epoch that
        has it."""
        last: dict[str, Any] = {}
        for epoch in [*self.teacher_epochs, *self.epochs]:
            last |= epoch.values
        hybrids = self.summary.get("hybrid_top1") or {tap: last.get(f"hybrid_top1/{tap}") for tap in self.taps}
        found = {TEACHER: self.summary.get("teacher_top1", last.get("teacher_top1"))}
        found |= {HYBRID + tap: value for tap, value in hybrids.items()}
        found |= {STUDENT: self.summary.get("student_top1", last.get("student_top1"))}
        return {name: value for name, value in found.items() if is_number(value)}

    def stages(self) -> list[tuple[str, int, int]]:
        """Name, first and last epoch of each stage."""
        found: dict[str, tuple[int, int]] = {}
        for epoch in self.epochs:
            first, _ = found.get(epoch.stage, (epoch.number, 0))
            found[epoch.stage] = (first, epoch.number)
        return [(name, first, last) for name, (first, last) in found.items()]

    def latest(self, prefix: str) -> dict[str, float]:
        """The numbers whose names begin so, without that, of the last epoch that has any."""
        found: dict[str, float] = {}
        for epoch in self.epochs:
            values = {k.removeprefix(prefix): v for k, v in epoch.values.items() if k.startswith(prefix)}
            found = {name: float(value) for name, value in values.items() if is_number(value)} or found
        return found

    def series(self, key: str) -> list[tuple[int, float]]:
        """Epoch and value of what is a number in the metrics."""
        pairs = [(epoch.number, epoch.values.get(key)) for epoch in self.epochs]
        return [(number, float(value)) for number, value in pairs if is_number(value)]


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        ValueError: if it is none, or a file in it is damaged; names it.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"run: {folder} is not the folder of a run: {CONFIG} is missing")
    earlier = sorted(folder.glob("config.*.yaml"), key=lambda path: (len(path.name), path.name))
    lines = [line for line in cleaned(RunFolder(folder).metrics()) if isinstance(line, dict) and "stage" in line]
    teacher = [line for line in lines if line["stage"] == TEACHER_STAGE]
    others = [line for line in lines if line["stage"] != TEACHER_STAGE]
    text = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
    return Run(
        name=cleaned(folder.resolve().name),
        config=_yaml(folder / CONFIG),
        config_text=cleaned(text),
        earlier_configs=[_yaml(path) for path in earlier],
        epochs=_numbered(others or teacher),
        teacher_epochs=_numbered(teacher) if others else [],
        summary=_json(folder / SUMMARY),
        raster=_json(folder / RASTER),
    )


def _numbered(lines: list[dict[str, Any]]) -> list[Epoch]:
    return [Epoch(number, str(line["stage"]), line) for number, line in enumerate(lines, 1)]


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no configuration")
    return cleaned(flatten(values))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object")
    return cleaned(values)
