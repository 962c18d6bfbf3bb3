"""The main job: a timm teacher becomes a spiking network, by block-wise hybrid replacement."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill.config import DistillConfig
from distill.data import (
    Preprocessing,
    Splits,
    eval_loader,
    load_data,
    prepare_loader,
    skipped_images,
)
from distill.data.event_config import is_events
from distill.data.event_frames import summed
from distill.evaluation import TEACHER, top1
from distill.hybrid import HybridDistiller
from distill.hybrid_network import check_hybrid
from distill.hybrid_training import HybridTraining
from distill.losses import check_tap_weights
from distill.network_config import InitConfig
from distill.preparation import check_training
from distill.results import (
    write_results,
)
from distill.schedules import stages_of
from distill.session import Session
from distill.students import calibration_batches, check_precision, make_student, probe_images
from distill.teacher_training import train_teacher
from distill.teachers import build_teacher, check_accuracy, check_classes, has_weights, teacher_preprocessing
from models import check_saveable

log = logging.getLogger(__name__)


def run(config: DistillConfig, session: Session, resume: bool) -> dict[str, Any]:
    """The job of scripts/distill.py: teacher, student, hybrids, training, evaluation, export.

    Returns:
        the summary that it writes to summary.json.
    """
    started = time.perf_counter()
    accelerator, seed, workers = session.accelerator, config.run.seed, config.data.workers
    check_precision(config.student, accelerator.mixed_precision)
    preprocessing = teacher_preprocessing(config.teacher)
    log.info("images: %s", preprocessing)
    data = load_data(config.data, preprocessing, seed, config.student.timesteps)
    log.info("%d images to train on, %d to evaluate on, %d classes", len(data.train), len(data.eval), len(data.classes))
    teacher = build_teacher(config.teacher, len(data.classes)).to(accelerator.device)
    check_classes(config.teacher, teacher, data.classes)
    images = probe_images(data, accelerator.device)
    begun = session.stages_begun() - {"teacher"}
    init = None if begun else config.init  # a begun stage's weights count, not those of another run
    _check(accelerator, config, teacher, data, images, preprocessing, init)
    loader = prepare_loader(accelerator, eval_loader(data.eval, config.train.batch_size, workers=workers))
    if has_weights(config.teacher) and not begun:
        _check_teacher(config, session, teacher, loader, data)
    earlier = sum(line["seconds"] for line in session.folder.metrics()) if resume else 0.0
    if not has_weights(config.teacher):
        log.info("the teacher comes without weights: it is trained first")
        whole = load_data(config.data, preprocessing, seed) if is_events(config.data) else data  # sums over time
        each = prepare_loader(accelerator, eval_loader(whole.eval, config.teacher_train.batch_size, workers=workers))
        teacher = train_teacher(
            session, whole, each, config.teacher, preprocessing, config.teacher_train, seed, workers, resume
        )
        # training it has ended what Accelerate knew of loaders
        loader = prepare_loader(accelerator, eval_loader(data.eval, config.train.batch_size, workers=workers))
        if not begun:
            _check_teacher(config, session, teacher, loader, data)
    set_seed(seed)  # from here on the same, whether the teacher was trained just now or not
    batches = None if begun else calibration_batches(data, config.init.calibration_images, seed, accelerator.device)
    distiller = make_distiller(config, teacher, images, preprocessing, init, batches)
    log.info("hybrids at %s", distiller.student_taps)
    trained = HybridTraining(config, session, data, preprocessing, images, loader)
    summary = trained.stages(distiller, begun, resume)
    summary["skipped_images"] = list(skipped_images(accelerator, data.train, data.eval))
    summary["seconds"] = earlier + time.perf_counter() - started
    if accelerator.is_main_process:
        write_results(session, summary, distiller.student, config.teacher.name, preprocessing, config.data, data)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return summary


def make_distiller(
    config: DistillConfig,
    teacher: nn.Module,
    images: Tensor,
    preprocessing: Preprocessing,
    init: InitConfig | None = None,
    batches: Iterable[Tensor] | None = None,
    say: bool = True,
) -> HybridDistiller:
    """Student, adapters and teacher, with the taps checked on some images (B, C, H, W).

    Args:
        batches: images to calibrate the student on, where the configuration asks for it; None: it is not calibrated.
        say: whether to log which weights were copied.
    """
    classes: Any = teacher.num_classes
    student = make_student(config.student, teacher, classes, images, preprocessing, init, batches, say)
    student.set_grad_checkpointing(config.train.grad_checkpointing)
    distiller = HybridDistiller(
        teacher, student.train(), config.taps, config.student_taps, images, config.loss.feature, config.adapter
    )
    check_tap_weights(config.loss, [tap.name for tap in distiller.taps])
    return distiller.train()


def _check(
    accelerator: Accelerator,
    config: DistillConfig,
    teacher: nn.Module,
    data: Splits,
    images: Tensor,
    preprocessing: Preprocessing,
    init: InitConfig | None,
) -> None:
    """Makes everything once, before a folder is made or a teacher trained for hours: what is wrong shows here."""

    seed, workers = config.run.seed, config.data.workers
    if not has_weights(config.teacher):
        # before the distiller freezes it
        check_training(accelerator, teacher, data.train, config.teacher_train, seed, workers)
        _wake_head(teacher)
    distiller = make_distiller(config, teacher, images, preprocessing, init, say=False)
    check_saveable(distiller.student)
    check_training(accelerator, distiller, data.train, config.train, seed, workers)
    stages_of(config.schedule, [tap.name for tap in distiller.taps], config.train.epochs)
    if config.save_hybrids:
        for tap in distiller.taps:
            check_hybrid(distiller.hybrid(tap.name))


def _check_teacher(
    config: DistillConfig, session: Session, teacher: nn.Module, loader: DataLoader, data: Splits
) -> None:
    """Looks at how often the teacher is right, before anything learns from it."""
    teacher.eval()
    found = top1(session.accelerator, loader, lambda images: {TEACHER: teacher(summed(images))})[TEACHER]
    log.info("the teacher is right on %.2f %% of the images to evaluate on", found)
    check_accuracy(config.teacher, found, len(data.eval), len(data.classes))


def _wake_head(teacher: nn.Module) -> None:
    """Some of timm's classifiers start at zero: with equal logits for all images no tap could be checked."""
    heads: Any = teacher.get_classifier()  # type: ignore[operator]
    for head in heads if isinstance(heads, tuple) else (heads,):
        for parameter in head.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
