"""The main job: a timm teacher becomes a spiking network, by block-wise hybrid replacement."""

from __future__ import annotations

import logging
import time
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill.backward import once
from distill.config import DistillConfig, TrainConfig
from distill.data import Preprocessing, Splits, eval_loader, load_data, train_loader
from distill.evaluation import by_name, top1
from distill.hybrid import HybridDistiller
from distill.loop import FitResult, fit, make_optimizer
from distill.losses import distillation_losses
from distill.network_config import InitConfig
from distill.results import student_results, write_results
from distill.runs import has_checkpoint
from distill.session import Session
from distill.students import make_student, probe_images
from distill.teacher_training import train_teacher
from distill.teachers import build_teacher, check_classes, has_weights, teacher_preprocessing
from models import check_saveable

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
    images = probe_images(data, accelerator.device)
    goes_on = resume and has_checkpoint(config.run, "student")  # then its weights count, not those of another run
    init = None if goes_on else config.init
    _check(config, teacher, data, images, preprocessing, init)
    earlier = sum(line["seconds"] for line in session.folder.metrics()) if resume else 0.0
    if not has_weights(config.teacher):
        log.info("the teacher comes without weights: it is trained first")
        loader = accelerator.prepare(eval_loader(data.eval, config.teacher_train.batch_size, workers=workers))
        teacher = train_teacher(
            session, data, loader, config.teacher, config.teacher_train, config.run.seed, workers, resume
        )
    set_seed(seed)  # from here on the same, whether the teacher was trained just now or not
    distiller = make_distiller(config, teacher, images, preprocessing, init)
    log.info("hybrids at %s", [tap.name for tap in distiller.taps])
    loader = accelerator.prepare(eval_loader(data.eval, config.train.batch_size, workers=workers))
    result = fit(
        stage="student",
        accelerator=accelerator,
        model=distiller,
        backward=once(lambda outputs, labels: distillation_losses(outputs, labels, config.loss)),
        loader=train_loader(data.train, config.train.batch_size, seed=seed, workers=workers),
        evaluate=lambda model: top1(accelerator, loader, lambda images: by_name(model(images))),
        config=config.train,
        folder=session.folder,
        resume=resume,
    )
    summary = _summary(config, session, loader, result)
    summary["seconds"] = earlier + time.perf_counter() - started
    if accelerator.is_main_process:
        student = accelerator.unwrap_model(result.model).student
        write_results(session, summary, student, config.teacher.name, preprocessing, config.data, data)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return summary


def make_distiller(
    config: DistillConfig,
    teacher: nn.Module,
    images: Tensor,
    preprocessing: Preprocessing,
    init: InitConfig | None = None,
) -> HybridDistiller:
    """Student, adapters and teacher, with the taps checked on some images (B, C, H, W)."""
    classes: Any = teacher.num_classes
    student = make_student(config.student, teacher, classes, images, preprocessing, init)
    return HybridDistiller(teacher, student.train(), config.taps, config.student_taps, images).train()


def _check(
    config: DistillConfig,
    teacher: nn.Module,
    data: Splits,
    images: Tensor,
    preprocessing: Preprocessing,
    init: InitConfig | None,
) -> None:
    """Makes everything once, before a folder is made or a teacher trained for hours: what is wrong shows here."""

    def check_training(model: nn.Module, train: TrainConfig) -> None:
        make_optimizer(model, train)
        train_loader(data.train, train.batch_size, seed=config.run.seed, workers=config.data.workers)

    if not has_weights(config.teacher):
        check_training(teacher, config.teacher_train)  # before the distiller freezes it
    distiller = make_distiller(config, teacher, images, preprocessing, init)
    check_saveable(distiller.student)
    check_training(distiller, config.train)


def _summary(config: DistillConfig, session: Session, loader: DataLoader, result: FitResult) -> dict[str, Any]:
    accelerator = session.accelerator
    accuracy = result.evaluation or top1(accelerator, loader, lambda images: by_name(result.model(images)))
    student = accelerator.unwrap_model(result.model).student
    prefix = "hybrid_top1/"
    return {
        "teacher_top1": accuracy["teacher_top1"],
        "hybrid_top1": {name.removeprefix(prefix): v for name, v in accuracy.items() if name.startswith(prefix)},
        **student_results(accelerator, loader, student, accuracy["student_top1"], config.eval_timesteps, result),
    }
