"""The main job: a timm teacher becomes a spiking network, by block-wise hybrid replacement."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from distill.config import DistillConfig, StudentConfig, TrainConfig
from distill.data import Preprocessing, Splits, eval_loader, load_data, train_loader
from distill.evaluation import by_name, firing_rates, top1, top1_by_timesteps
from distill.hybrid import HybridDistiller
from distill.loop import FitResult, fit, make_optimizer
from distill.losses import distillation_losses
from distill.report import model_card, rate_warnings, table, versions
from distill.session import Session
from distill.teacher_training import train_teacher
from distill.teachers import build_teacher, check_classes, has_weights, teacher_preprocessing
from models import SpikingNetwork, check_saveable, create_snn, save_snn, spiking_twin
from models.io import replace_text

log = logging.getLogger(__name__)


def run(config: DistillConfig, session: Session, resume: bool) -> dict[str, Any]:
    """The job of scripts/distill.py: teacher, student, hybrids, training, evaluation, export.

    Returns:
        the summary that it writes to summary.json.
    """
    started = time.perf_counter()
    accelerator, seed, workers = session.accelerator, config.run.seed, config.data.workers
    preprocessing = teacher_preprocessing(config.teacher)
    data = load_data(config.data, preprocessing, seed)
    log.info("%d images to train on, %d to evaluate on, %d classes", len(data.train), len(data.eval), len(data.classes))
    teacher = build_teacher(config.teacher, len(data.classes)).to(accelerator.device)
    check_classes(config.teacher, teacher, len(data.classes))
    images = _probe_images(data, accelerator.device)
    _check(config, teacher, data, images)
    earlier = sum(line["seconds"] for line in session.folder.metrics()) if resume else 0.0
    if not has_weights(config.teacher):
        log.info("the teacher comes without weights: it is trained first")
        loader = accelerator.prepare(eval_loader(data.eval, config.teacher_train.batch_size, workers=workers))
        teacher = train_teacher(
            session, data, loader, config.teacher, config.teacher_train, config.run.seed, workers, resume
        )
    set_seed(seed)  # from here on the same, whether the teacher was trained just now or not
    distiller = make_distiller(config, teacher, images)
    log.info("hybrids at %s", [tap.name for tap in distiller.taps])
    loader = accelerator.prepare(eval_loader(data.eval, config.train.batch_size, workers=workers))
    result = fit(
        stage="student",
        accelerator=accelerator,
        model=distiller,
        losses=lambda outputs, labels: distillation_losses(outputs, labels, config.loss),
        loader=train_loader(data.train, config.train.batch_size, seed=seed, workers=workers),
        evaluate=lambda model: top1(accelerator, loader, lambda images: by_name(model(images))),
        config=config.train,
        folder=session.folder,
        resume=resume,
    )
    summary = _summary(config, session, loader, result)
    summary["seconds"] = earlier + time.perf_counter() - started
    if accelerator.is_main_process:
        _write(config, session, summary, accelerator.unwrap_model(result.model).student, preprocessing, data)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return summary


def make_student(config: StudentConfig, teacher: nn.Module, images: Tensor) -> SpikingNetwork:
    """A twin of the teacher, or a network by name with the teacher's classes and channels.

    Args:
        images: (B, C, H, W), of the size that the student will see.
    """
    if config.name == "twin":
        return spiking_twin(
            teacher,
            config.timesteps,
            config.neuron,
            config.init,
            config.algorithm,
            config.gates,
            input_size=tuple(images.shape[1:]),  # type: ignore[arg-type]
        )
    classes: Any = teacher.num_classes
    snn = create_snn(config.name, classes, config.timesteps, images.shape[1], config.neuron, config.algorithm)
    return snn.to(images.device)


def make_distiller(config: DistillConfig, teacher: nn.Module, images: Tensor) -> HybridDistiller:
    """Student, adapters and teacher, with the taps checked on some images (B, C, H, W)."""
    student = make_student(config.student, teacher, images)
    return HybridDistiller(teacher, student.train(), config.taps, config.student_taps, images).train()


def _check(config: DistillConfig, teacher: nn.Module, data: Splits, images: Tensor) -> None:
    """Makes everything once, before a folder is made or a teacher trained for hours: what is wrong shows here."""

    def check_training(model: nn.Module, train: TrainConfig) -> None:
        make_optimizer(model, train)
        train_loader(data.train, train.batch_size, seed=config.run.seed, workers=config.data.workers)

    if not has_weights(config.teacher):
        check_training(teacher, config.teacher_train)  # before the distiller freezes it
    distiller = make_distiller(config, teacher, images)
    check_saveable(distiller.student)
    check_training(distiller, config.train)


def _probe_images(data: Splits, device: torch.device) -> Tensor:
    """A few different images as the networks will see them."""
    count = min(8, len(data.eval))
    return torch.stack([data.eval[i * len(data.eval) // count][0] for i in range(count)]).to(device)


def _summary(config: DistillConfig, session: Session, loader: Any, result: FitResult) -> dict[str, Any]:
    accelerator = session.accelerator
    accuracy = result.evaluation or top1(accelerator, loader, lambda images: by_name(result.model(images)))
    student = accelerator.unwrap_model(result.model).student
    others = [steps for steps in config.eval_timesteps if steps != student.timesteps]
    by_timesteps = top1_by_timesteps(accelerator, loader, student, others) | {
        student.timesteps: accuracy["student_top1"]
    }
    rates = firing_rates(accelerator, loader, student)
    prefix = "hybrid_top1/"
    return {
        "teacher_top1": accuracy["teacher_top1"],
        "student_top1": accuracy["student_top1"],
        "student_top1_by_timesteps": dict(sorted(by_timesteps.items())),
        "hybrid_top1": {name.removeprefix(prefix): v for name, v in accuracy.items() if name.startswith(prefix)},
        "timesteps": student.timesteps,
        "parameters": sum(p.numel() for p in student.parameters()),
        "mean_firing_rate": sum(rates.values()) / len(rates),
        "firing_rates": rates,
        "train_seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "versions": versions(),
    }


def _write(
    config: DistillConfig,
    session: Session,
    summary: dict[str, Any],
    student: SpikingNetwork,
    preprocessing: Preprocessing,
    data: Splits,
) -> None:
    folder = session.folder
    size, mean, std = preprocessing.input_size, preprocessing.mean, preprocessing.std
    extra = {"input_size": list(size), "mean": list(mean), "std": list(std), "classes": list(data.classes)}
    save_snn(student, folder.path / "student", extra)
    what = f"{config.data.name}" + (f" ({config.data.root})" if config.data.root else "")
    replace_text(
        folder.path / "student" / "README.md", model_card(summary, config.teacher.name, what, session.config_text)
    )
    folder.write_summary(summary)
    for line in rate_warnings(summary["firing_rates"]):
        log.warning("warning: %s", line)
    log.info("\n%s\n", table(summary))
    log.info("%.0f s; everything is in %s", summary["seconds"], folder.path)
