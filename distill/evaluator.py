"""All that is looked at of one saved network at one number of time steps."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn

from distill.config import EvaluationConfig
from distill.data import Splits, eval_loader, prepare_loader, sample_loader
from distill.data.event_frames import summed
from distill.early_exit import early_exit
from distill.energy import Cost
from distill.evaluation import TEACHER
from distill.frontier import ENERGY_IMAGES
from distill.hybrid_network import Hybrid
from distill.judgement import Figures, judge
from distill.network_energy import NetworkEnergy
from distill.random_numbers import repeatable
from distill.recalibration import recalibrated
from distill.students import calibration_batches
from models import SpikingNetwork

STUDENT = "student"


class AtTimesteps(NamedTuple):
    """What was seen at one T."""

    figures: Figures
    teacher: Figures | None
    firing_rates: dict[str, float]
    cost: Cost
    exits: list[dict[str, float]]
    """Empty where early exit was not asked for."""
    recalibration_images: int | None
    """That batch-norm statistics were estimated on; None where they are the network's own."""

    def entries(self) -> dict[str, Any]:
        """In JSON types, as --out has them for each T."""
        agreement = {} if self.figures.agreement is None else {"agreement": self.figures.agreement}
        return {
            "top1": self.figures.top1,
            "top5": self.figures.top5,
            **agreement,
            "ece": self.figures.ece,
            "mean_confidence": self.figures.confidence,
            "mean_firing_rate": sum(self.firing_rates.values()) / len(self.firing_rates),
            "firing_rates": self.firing_rates,
            **self.cost.figures(),
            "layers": self.cost.by_layer(),
        }


class Evaluator:
    """A network and how it is looked at.

    Args:
        network: on its device, in evaluation mode; its T is the caller's to set.
        teacher: with which predictions are compared, or None.
        energy: of the network.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        accelerator: Accelerator,
        network: SpikingNetwork | Hybrid,
        teacher: nn.Module | None,
        energy: NetworkEnergy,
    ) -> None:
        self._config, self._accelerator = config, accelerator
        self._network, self._teacher, self._energy = network, teacher, energy

    def at(self, timesteps: int, data: Splits, seed: int, exits: bool) -> AtTimesteps:
        """The network at this T.

        Args:
            data: of event data with as many frames.
            seed: of the order of the training images.
            exits: whether to look at early exit.
        """
        config, accelerator, network = self._config, self._accelerator, self._network
        network.timesteps = timesteps
        loader = prepare_loader(accelerator, eval_loader(data.eval, config.batch_size, workers=config.data.workers))
        sample = prepare_loader(accelerator, sample_loader(data.eval, ENERGY_IMAGES, config.batch_size))
        statistics: contextlib.AbstractContextManager[int | None] = contextlib.nullcontext()
        if config.recalibrate:
            batches = calibration_batches(data, config.recalibration_images, seed, accelerator.device)
            statistics = recalibrated(accelerator, network, batches)
        with statistics as recalibrated_on:
            with repeatable(accelerator.device):
                judged = judge(accelerator, loader, self._logits, network)
            with repeatable(accelerator.device):  # the same spikes, where images are encoded as spikes
                stops = early_exit(accelerator, loader, network, config.exit_thresholds) if exits else []
            cost = self._energy.cost(accelerator, sample)
        del loader, sample
        accelerator.free_memory()  # which keeps every loader, and a loader its processes: those of each T would pile up
        return AtTimesteps(
            judged.figures[STUDENT], judged.figures.get(TEACHER), judged.firing_rates, cost, stops, recalibrated_on
        )

    def _logits(self, images: Tensor) -> dict[str, Tensor]:
        teacher = {} if self._teacher is None else {TEACHER: self._teacher(summed(images))}
        return {**teacher, STUDENT: self._network(images)}
