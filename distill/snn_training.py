"""Training of a spiking network on labels alone: no teacher, the same data, loop, run folder and figures."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from distill.backward import Backward, each_step, once
from distill.batch_size import batch_that_fits
from distill.checkpoints import Checkpoints
from distill.config import SnnTrainingConfig
from distill.cuda_graphs import GRAPHED
from distill.data import (
    Preprocessing,
    Splits,
    eval_loader,
    load_data,
    prepare_loader,
    sample_loader,
    skipped_images,
    train_loader,
)
from distill.evaluation import at_timesteps, top1
from distill.frontier import ENERGY_IMAGES, counted, in_order, student_rows
from distill.loop import fit
from distill.mixing import Mixing
from distill.network_config import InitConfig
from distill.preparation import check_training, unwrap
from distill.random_numbers import repeatable
from distill.results import last_backward_figures, other_timesteps, save_student, student_results, write_results
from distill.session import Session
from distill.snn_losses import SnnLossConfig, snn_losses
from distill.students import calibration_batches, check_precision, make_student, probe_images, sample_images
from distill.teachers import build_teacher, teacher_preprocessing
from models import ONLINE, SpikingNetwork, check_saveable
from models.network import probing

log = logging.getLogger(__name__)


def run(config: SnnTrainingConfig, session: Session, resume: bool) -> dict[str, Any]:
    """The job of scripts/train_snn.py: network, training, evaluation, export.

    Returns:
        the summary that it writes to summary.json.
    """
    started = time.perf_counter()
    accelerator, seed, workers = session.accelerator, config.run.seed, config.data.workers
    preprocessing = teacher_preprocessing(config.ann, "ann")
    log.info("images: %s", preprocessing)
    data = load_data(config.data, preprocessing, seed, config.student.timesteps)
    log.info("%d images to train on, %d to evaluate on, %d classes", len(data.train), len(data.eval), len(data.classes))
    check_precision(config.student, accelerator.mixed_precision)
    images = probe_images(data, accelerator.device)
    goes_on = "student" in session.stages_begun()  # then its weights count, not those of another run
    make = functools.partial(_make, config, len(data.classes), images, preprocessing, None if goes_on else config.init)
    count = config.init.calibration_images
    batches = None if goes_on else calibration_batches(data, count, seed, accelerator.device)
    _check(accelerator, config, make(say=False), data, images)
    earlier = sum(line["seconds"] for line in session.folder.metrics()) if resume else 0.0
    set_seed(seed)  # from here on the same, whatever was looked at before
    loader = prepare_loader(accelerator, eval_loader(data.eval, config.train.batch_size, workers=workers))
    snn = make(batches).train()
    backward = backward_of(config.loss, config.student.algorithm, config.student.timesteps)
    checkpoints = Checkpoints(session.folder.checkpoints / "student") if resume else None
    batch = sample_images(data, accelerator.device)
    train = batch_that_fits(accelerator, snn, backward, batch, config.train, checkpoints)
    result = fit(
        stage="student",
        accelerator=accelerator,
        model=snn,
        backward=backward,
        loader=train_loader(data.train, train.batch_size, seed=seed, workers=workers),
        evaluate=lambda model: top1(accelerator, loader, lambda images: {"student_top1": model(images)}),
        config=train,
        folder=session.folder,
        resume=resume,
        mixing=Mixing(config.train, len(data.classes), config.loss.label_smoothing, seed),
        score="student_top1",
        same_kernels=config.student.algorithm in GRAPHED,
    )
    student: Any = unwrap(accelerator, result.model)
    save_student(session, student, preprocessing, data)
    found = {student.timesteps: result.evaluation["student_top1"]}
    others = set(other_timesteps(config.data, config.eval_timesteps)) - {student.timesteps}
    with repeatable(accelerator.device):
        for steps in sorted(others):
            with at_timesteps(student, steps):
                found[steps] = top1(accelerator, loader, lambda images: {"student": student(images)})["student"]
    sample = prepare_loader(accelerator, sample_loader(data.eval, ENERGY_IMAGES, config.train.batch_size))
    rows = counted(accelerator, lambda: student_rows(accelerator, sample, student, found))
    summary = student_results(accelerator, loader, student, found, in_order(rows, []), result.seconds, result.images)
    summary |= last_backward_figures(session.folder.metrics())
    summary["skipped_images"] = list(skipped_images(accelerator, data.train, data.eval))
    summary["seconds"] = earlier + time.perf_counter() - started
    if accelerator.is_main_process:
        write_results(session, summary, student, None, preprocessing, config.data, data)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return summary


def backward_of(loss: SnnLossConfig, algorithm: str, timesteps: int) -> Backward:
    """The forward and backward passes that an algorithm needs for a loss (`distill.snn_losses`)."""
    losses = functools.partial(snn_losses, config=loss, timesteps=timesteps)
    tet = loss.name == "tet"
    if algorithm in ONLINE:
        return each_step(lambda logits, labels: losses(logits[None] if tet else logits, labels), timesteps)
    return once(losses, per_step=True) if tet else once(losses)


def _make(
    config: SnnTrainingConfig,
    classes: int,
    images: Tensor,
    preprocessing: Preprocessing,
    init: InitConfig | None,
    batches: Iterable[Tensor] | None = None,
    say: bool = True,
) -> SpikingNetwork:
    twin = config.student.name == "twin"
    ann = build_teacher(config.ann, classes).to(images.device) if twin else None
    snn = make_student(config.student, ann, classes, images, preprocessing, init, batches, say)
    snn.set_grad_checkpointing(config.train.grad_checkpointing)
    return snn


def _check(
    accelerator: Accelerator, config: SnnTrainingConfig, snn: SpikingNetwork, data: Splits, images: Tensor
) -> None:
    """Looks, before a folder is made, at what would fail in the first step or after the last."""
    check_saveable(snn)
    try:
        with probing(snn, timesteps=1):
            snn(images[:1])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a map that a pool has nothing left of
        size = "x".join(map(str, images.shape[2:]))
        raise ValueError(f"student.name: {config.student.name!r} does not take images of {size}: {error}") from error
    check_training(accelerator, snn, data.train, config.train, config.run.seed, config.data.workers)
