"""What a trained spiking network leaves behind, whichever way it was trained: its figures and its folder."""

from __future__ import annotations

import logging
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader

from distill.data import DataConfig, Preprocessing, Splits
from distill.evaluation import firing_rates, top1_by_timesteps
from distill.loop import FitResult
from distill.report import model_card, rate_warnings, table, versions
from distill.session import Session
from models import SpikingNetwork, save_snn
from models.io import replace_text

log = logging.getLogger(__name__)


def student_results(
    accelerator: Accelerator,
    loader: DataLoader,
    student: SpikingNetwork,
    student_top1: float,
    eval_timesteps: list[int],
    result: FitResult,
) -> dict[str, Any]:
    """The entries of summary.json that every spiking network has.

    Args:
        loader: of the evaluation images, prepared.
        student_top1: at its own T, in percent.
        eval_timesteps: the other numbers of time steps to look at.
    """
    others = [steps for steps in eval_timesteps if steps != student.timesteps]
    by_timesteps = top1_by_timesteps(accelerator, loader, student, others) | {student.timesteps: student_top1}
    rates = firing_rates(accelerator, loader, student)
    return {
        "student_top1": student_top1,
        "student_top1_by_timesteps": dict(sorted(by_timesteps.items())),
        "timesteps": student.timesteps,
        "algorithm": student.algorithm,
        "parameters": sum(p.numel() for p in student.parameters()),
        "mean_firing_rate": sum(rates.values()) / len(rates),
        "firing_rates": rates,
        "train_seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "versions": versions(),
    }


def write_results(
    session: Session,
    summary: dict[str, Any],
    student: SpikingNetwork,
    teacher: str | None,
    preprocessing: Preprocessing,
    data_config: DataConfig,
    data: Splits,
) -> None:
    """Writes student/ and summary.json and shows the table; on the main process only.

    Args:
        teacher: its timm name, or None.
    """
    folder = session.folder
    size, mean, std = preprocessing.input_size, preprocessing.mean, preprocessing.std
    extra = {"input_size": list(size), "mean": list(mean), "std": list(std), "classes": list(data.classes)}
    save_snn(student, folder.path / "student", extra)
    what = f"{data_config.name}" + (f" ({data_config.root})" if data_config.root else "")
    replace_text(folder.path / "student" / "README.md", model_card(summary, teacher, what, session.config_text))
    folder.write_summary(summary)
    for line in rate_warnings(summary["firing_rates"]):
        log.warning("warning: %s", line)
    log.info("\n%s\n", table(summary))
    log.info("%.0f s; everything is in %s", summary["seconds"], folder.path)
