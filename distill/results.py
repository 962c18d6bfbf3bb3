"""What a trained spiking network leaves behind, whichever way it was trained: its figures and its folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader

from distill.data import DataConfig, Preprocessing, Splits
from distill.data.event_config import is_events
from distill.energy import assumptions
from distill.epoch_log import BACKWARD
from distill.frontier import ENERGY_IMAGES, STUDENT, Row
from distill.judgement import BINS, judge
from distill.random_numbers import repeatable
from distill.report import model_card, rate_warnings, table, versions, warn_of_skipped
from distill.session import Session
from distill.spike_examples import RASTER, spike_examples
from models import SpikingNetwork, save_snn
from models.io import replace_text

log = logging.getLogger(__name__)


def student_results(
    accelerator: Accelerator,
    loader: DataLoader,
    student: SpikingNetwork,
    top1: Mapping[int, float],
    frontier: Sequence[Row],
    train_seconds: float,
    images: int,
) -> dict[str, Any]:
    """The entries of summary.json that every spiking network has.

    Args:
        loader: of the evaluation images, prepared.
        top1: of the network, in percent, at its own T and at others.
        frontier: of all networks of the run; empty where energies could not be counted.
        train_seconds: of its training, on the main process.
        images: that it was trained on in that time, all processes together.
    """
    with repeatable(accelerator.device):
        judged = judge(accelerator, loader, lambda images: {"student": student(images)}, student)
    figures, rates = judged.figures["student"], judged.firing_rates
    return {
        "student_top1": top1[student.timesteps],
        "student_top1_by_timesteps": dict(sorted(top1.items())),
        "timesteps": student.timesteps,
        "algorithm": student.algorithm,
        "parameters": sum(p.numel() for p in student.parameters()),
        "mean_firing_rate": sum(rates.values()) / len(rates),
        "firing_rates": rates,
        "frontier": list(frontier),
        "energy_assumptions": assumptions(min(ENERGY_IMAGES, judged.images)) if frontier else [],
        "confidence": {"ece": figures.ece, "bins": BINS, "mean": figures.confidence},
        "train_seconds": train_seconds,
        "images_per_second": images / max(train_seconds, 1e-9),
        "versions": versions(),
    }


def last_backward_figures(metrics: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The entry "backward" of summary.json: what networks said of their backward passes in the last epoch of which
    they said something; no entry where they never did.

    Args:
        metrics: the lines of a training, in their order.
    """
    last: dict[str, float] = {}
    for line in metrics:
        found = {name.removeprefix(BACKWARD): v for name, v in line.items() if name.startswith(BACKWARD)}
        last = found or last
    return {"backward": last} if last else {}


def other_timesteps(data: DataConfig, timesteps: list[int]) -> list[int]:
    """The numbers of time steps at which a run evaluates, besides its own: none with event data.

    Frames of another T are other data, which scripts/evaluate.py reads.
    """
    if timesteps and is_events(data):
        log.info("eval_timesteps is left out: other frames of event data are for scripts/evaluate.py --timesteps")
        return []
    return timesteps


def save_student(session: Session, student: SpikingNetwork, preprocessing: Preprocessing, data: Splits) -> None:
    """Writes student/, before anything that comes after a training can fail; on the main process only."""
    if session.accelerator.is_main_process:
        save_snn(student, session.folder.path / STUDENT, image_extra(preprocessing, data))


def write_results(
    session: Session,
    summary: dict[str, Any],
    student: SpikingNetwork,
    teacher: str | None,
    preprocessing: Preprocessing,
    data_config: DataConfig,
    data: Splits,
) -> None:
    """Writes the student's card, summary.json and report.html and shows the table; on the main process only.

    Args:
        teacher: its timm name, or None.
    """
    folder = session.folder
    what = f"{data_config.name}" + (f" ({data_config.root})" if data_config.root else "")
    card = model_card(summary, teacher, what, session.config_text, is_events(data_config))
    replace_text(folder.path / STUDENT / "README.md", card)
    folder.write_summary(summary)
    leave_report(session.accelerator, folder.path, student, list(summary["firing_rates"]), preprocessing, data)
    for line in rate_warnings(summary["firing_rates"]):
        log.warning("warning: %s", line)
    warn_of_skipped(summary["skipped_images"])
    log.info("\n%s\n", table(summary))
    log.info("%.0f s; everything is in %s", summary["seconds"], folder.path)


def leave_report(
    accelerator: Accelerator,
    folder: Path,
    student: SpikingNetwork,
    layers: list[str],
    preprocessing: Preprocessing,
    data: Splits,
) -> None:
    """Writes raster.json and report.html. A run that has written its summary is not lost by what fails here.

    Args:
        layers: of neurons, in the order in which they run.
    """
    try:
        # here, because Matplotlib takes a second to import, which no other script needs
        from distill.html_report import write_report

        examples = spike_examples(accelerator, student, layers, preprocessing, data)
        replace_text(folder / RASTER, json.dumps(examples) + "\n")
        write_report(folder)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning("warning: the report could not be written (%s); try scripts/report.py --run %s", reason, folder)


def image_extra(preprocessing: Preprocessing, data: Splits) -> dict[str, Any]:
    """What a saved network says of its images and classes, in JSON types."""
    return preprocessing.entries() | {"classes": list(data.classes)}
