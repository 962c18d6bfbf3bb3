"""The main job: a timm teacher becomes a spiking network, by block-wise hybrid replacement."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill.adapter_start import start_adapters
from distill.batch_size import batch_that_fits
from distill.checkpoints import Checkpoints
from distill.config import DistillConfig
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
from distill.data.event_config import is_events
from distill.data.event_frames import summed
from distill.evaluation import TEACHER, at_timesteps, by_name, top1
from distill.frontier import ENERGY_IMAGES, Row, RowsOfStages, counted, in_order, row, stage_rows, teacher_costs
from distill.hybrid import HybridDistiller
from distill.hybrid_network import check_hybrid, save_hybrid
from distill.loop import fit
from distill.losses import check_tap_weights, distillation_losses
from distill.mixing import Mixing
from distill.network_config import InitConfig
from distill.preparation import check_training, unwrap
from distill.random_numbers import repeatable
from distill.results import (
    image_extra,
    last_backward_figures,
    other_timesteps,
    save_student,
    student_results,
    write_results,
)
from distill.schedules import Stage, different_steps, end_stages, hybrid_backward, prepare_stage, stages_of
from distill.session import Session
from distill.students import calibration_batches, check_precision, make_student, probe_images, sample_images
from distill.teacher_training import train_teacher
from distill.teachers import build_teacher, check_accuracy, check_classes, has_weights, teacher_preprocessing
from models import SpikingNetwork, check_saveable

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
    trained = _Training(config, session, data, preprocessing, images, loader)
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
    distiller = HybridDistiller(teacher, student.train(), config.taps, config.student_taps, images, config.loss.feature)
    check_tap_weights(config.loss, [tap.name for tap in distiller.taps])
    return distiller.train()


class _Training:
    """The stages of a run's schedule, one after the other."""

    def __init__(
        self,
        config: DistillConfig,
        session: Session,
        data: Splits,
        preprocessing: Preprocessing,
        images: Tensor,
        loader: DataLoader,
    ) -> None:
        self.config = config
        self.session = session
        self.data = data
        self.preprocessing = preprocessing
        self.images = images
        self.loader = loader
        """Of the evaluation images, prepared."""
        self.figures: dict[str, Any] = {}
        """What the last evaluation of each stage said."""
        self.by_timesteps: dict[int, float] = {}
        """Top-1 of the student when its training has ended, in percent, by T."""
        self.rows = RowsOfStages(session, config.schedule.name == "progressive")

    def stages(self, distiller: HybridDistiller, begun: set[str], resume: bool) -> dict[str, Any]:
        """Trains what is not trained yet; returns the summary."""
        config, session, accelerator = self.config, self.session, self.session.accelerator
        stages = stages_of(config.schedule, [tap.name for tap in distiller.taps], config.train.epochs)
        first = max((number for number, stage in enumerate(stages) if stage.name in begun), default=0)
        for number, stage in enumerate(stages[first:], first):
            if number > 0:
                set_seed(config.run.seed + number)  # the same, whether the stage before ran just now or not
            if len(stages) > 1:
                log.info("stage %d of %d: %s, %d epochs", number + 1, len(stages), stage.name, stage.epochs)
            prepare_stage(distiller, stage, self.images, config.schedule.freeze)
            if config.init.adapters == "regression" and stage.taps and stage.name not in begun:
                self._start_adapters(distiller, stage)
            self._fit(distiller, stage, resume)
            self._save(distiller, stage)
            self._weigh(distiller, stage)
            if number > 0 and accelerator.is_main_process:
                Checkpoints(session.folder.checkpoints / stages[number - 1].name).drop()
            accelerator.free_memory()
        end_stages(distiller)
        return self._summary(distiller, stages)

    def _start_adapters(self, distiller: HybridDistiller, stage: Stage) -> None:
        config, device = self.config, self.session.accelerator.device
        batches = calibration_batches(self.data, config.init.calibration_images, config.run.seed, device)
        explained = start_adapters(distiller, stage.taps, batches)
        shares = ", ".join(f"{tap} {100 * share:.0f} %" for tap, share in explained.items())
        log.info("adapters start at the share of the features' variance that is linear in the rates: %s", shares)

    def _fit(self, distiller: HybridDistiller, stage: Stage, resume: bool) -> None:
        config, session, seed = self.config, self.session, self.config.run.seed
        smoothing = config.loss.label_smoothing
        backward = hybrid_backward(
            stage, lambda outputs, labels: distillation_losses(outputs, labels, config.loss), seed
        )
        checkpoints = Checkpoints(session.folder.checkpoints / stage.name) if resume else None
        images, steps = sample_images(self.data, session.accelerator.device), different_steps(seed, stage)
        train = batch_that_fits(session.accelerator, distiller, backward, images, config.train, checkpoints, steps)
        result = fit(
            stage=stage.name,
            accelerator=session.accelerator,
            model=distiller,
            backward=backward,
            loader=train_loader(self.data.train, train.batch_size, seed=seed, workers=config.data.workers),
            evaluate=lambda model: self._accuracy(model, stage),
            config=replace(train, epochs=stage.epochs),
            folder=session.folder,
            resume=resume,
            mixing=Mixing(config.train, len(self.data.classes), smoothing, seed),
            epochs_before=stage.epochs_before,
            lr_epochs=stage.lr_epochs,
            unused_parameters=stage.draw,
            score="student_top1" if stage.student else f"hybrid_top1/{stage.taps[0]}",
            norms_of=distiller.student,
        )
        self.figures |= result.evaluation
        unwrap(session.accelerator, result.model)

    def _accuracy(self, model: nn.Module, stage: Stage) -> dict[str, float]:
        def logits(images: Tensor) -> dict[str, Tensor]:
            return by_name(model(images, active=list(stage.taps), student=stage.student))

        return top1(self.session.accelerator, self.loader, logits)

    def _weigh(self, distiller: HybridDistiller, stage: Stage) -> None:
        """Accuracy of what the stage has trained, as it is now, at each T, and its energy."""
        config, accelerator, student = self.config, self.session.accelerator, distiller.student
        distiller.eval()
        figures = {student.timesteps: dict(self.figures)}
        for steps in set(other_timesteps(config.data, config.eval_timesteps)) - {student.timesteps}:
            with repeatable(accelerator.device), at_timesteps(student, steps):
                figures[steps] = self._accuracy(distiller, stage)
        if stage.student:
            self.by_timesteps = {steps: found["student_top1"] for steps, found in figures.items()}
        sample = sample_loader(self.data.eval, ENERGY_IMAGES, config.train.batch_size)
        loader = prepare_loader(accelerator, sample)

        def count() -> list[Row]:
            teacher = teacher_costs(distiller, self.images)
            rows = stage_rows(accelerator, loader, distiller, stage, teacher, figures)
            return [*rows, row("teacher", None, self.figures["teacher_top1"], teacher.whole)]

        self.rows.add(counted(accelerator, count))

    def _save(self, distiller: HybridDistiller, stage: Stage) -> None:
        """The student, and each hybrid as it is when its own training ends."""
        if stage.student:
            save_student(self.session, distiller.student, self.preprocessing, self.data)
        if not (self.config.save_hybrids and self.session.accelerator.is_main_process):
            return
        extra = image_extra(self.preprocessing, self.data)
        for tap in stage.taps:
            folder = self.session.folder.path / "hybrids" / tap
            save_hybrid(distiller.hybrid(tap), folder, tuple(self.images.shape[1:]), extra)

    def _summary(self, distiller: HybridDistiller, stages: list[Stage]) -> dict[str, Any]:
        """Of each hybrid the figures of the epoch in which its training ended."""
        accelerator = self.session.accelerator
        names = [stage.name for stage in stages]
        # the main process alone has them: where a run was resumed, stages that had ended are found there
        lines = [line for line in self.session.folder.metrics() if line["stage"] in names]
        last: dict[str, Any] = {}
        for line in lines:
            last |= line
        last |= self.figures
        seconds, images = (sum(line[name] for line in lines) for name in ("train_seconds", "images"))
        student: SpikingNetwork = distiller.student
        student.eval()
        rows = in_order(self.rows.all, [tap.name for tap in distiller.taps])
        return {
            "teacher_top1": last["teacher_top1"],
            "hybrid_top1": _of_taps(last, "hybrid_top1/"),
            "hybrid_agreement": _of_taps(last, "hybrid_agreement/"),
            "student_agreement": last["student_agreement"],
            "schedule": self.config.schedule.name,
            **student_results(accelerator, self.loader, student, self.by_timesteps, rows, seconds, images),
            **last_backward_figures(lines),
        }


def _of_taps(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


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
