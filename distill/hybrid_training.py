"""The trainings of the main job: the stages of a schedule, what each leaves, and the figures of all."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill.adapter_start import start_adapters
from distill.batch_size import batch_that_fits
from distill.checkpoints import Checkpoints
from distill.config import DistillConfig
from distill.cuda_graphs import GRAPHED
from distill.data import (
    Preprocessing,
    Splits,
    prepare_loader,
    sample_loader,
    train_loader,
)
from distill.evaluation import at_timesteps, by_name, top1
from distill.frontier import ENERGY_IMAGES, Row, RowsOfStages, counted, in_order, row, stage_rows, teacher_costs
from distill.hybrid import HybridDistiller
from distill.hybrid_network import save_hybrid
from distill.loop import fit
from distill.losses import distillation_losses
from distill.mixing import Mixing
from distill.preparation import unwrap
from distill.random_numbers import repeatable
from distill.results import (
    image_extra,
    last_backward_figures,
    other_timesteps,
    save_student,
    student_results,
)
from distill.schedules import Stage, different_steps, end_stages, hybrid_backward, prepare_stage, stages_of
from distill.session import Session
from distill.students import calibration_batches, sample_images
from models import SpikingNetwork

log = logging.getLogger(__name__)


class HybridTraining:
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
        log.info("adapters start where they explain this share of the features' variance: %s", shares)

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
            same_kernels=config.student.algorithm in GRAPHED,
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
