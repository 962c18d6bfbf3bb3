"""What a user asks of a trained spiking network besides its logits: those of each step, and names for images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from models.prediction import Prediction, Source, predict, until_sure
from models.stepping import cumulative_logits


class Inference:
    """Methods of every spiking network (`models.SpikingNetwork`)."""

    def steps(self: Any, images: Tensor) -> Iterator[Tensor]:
        """Runs a step each time it is asked: the mean of the logits of the steps so far.

            for logits in snn.steps(images):
                if sure(logits):
                    break  # the steps that are left are not computed

        The membranes belong to the iterator: other calls of the network may come in between, and nothing is left in it.
        Poisson input is drawn when its step runs. Under autocast, iterate inside of it.

        Args:
            images: (B, C, H, W), or (T, B, C, H, W), a frame for each step.

        Returns:
            an iterator over T tensors (B, classes), without a graph; the last is ``snn(images)``, to rounding.

        Raises:
            ValueError: for images that the network does not take, in training mode, in step mode "s", or with DSR,
                whose neurons look at all steps at once.
            UnsupportedOperationError: at the first step, names the module that must know all steps: a gate, or a batch
                norm without running statistics.
        """
        if self.training:
            raise ValueError("steps is for a network in evaluation mode: call eval() first")
        self._check_runs_whole("steps")
        if self.algorithm == "dsr":
            raise ValueError("steps: DSR looks at all time steps at once: its networks do not run step by step")
        self._check(images)
        return cumulative_logits(self._traverse, self._frames(images))

    def _frames(self: Any, images: Tensor) -> Iterator[Tensor]:
        """The input of each step, (B, C, H, W)."""
        for t in range(self.timesteps):
            if images.ndim == 5:
                yield images[t]
            else:
                yield images if self.input_encoder is None else self.input_encoder(images, 1)[0]

    def predict(
        self: Any,
        images: Source | Sequence[Source],
        topk: int = 5,
        early_exit: float | None = None,
        batch_size: int = 32,
    ) -> Prediction | list[Prediction]:
        """Classes and probabilities of image files, resized, cropped and normalised as in evaluation.

        Args:
            images: a PIL image or the path of one, or a list of them.
            topk: number of classes to give, at least 1.
            early_exit: stop an image at the step at which the softmax probability of its likeliest class exceeds that
                of the second by so much, in (0, 1]; None: run all T steps.
            batch_size: images that run together, at most.

        Returns:
            one `models.Prediction`, or a list in the order of the images.

        Raises:
            ValueError: for a network that takes no images (event frames) or does not say how they are made; in training
                mode; for a value out of range.
            FileNotFoundError, UnreadableImage: name the file.
        """
        self._check_runs_whole("predict")

        def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
            if early_exit is not None:
                return until_sure(self.steps(pixels), early_exit)
            return self(pixels), torch.full((len(pixels),), self.timesteps)

        return predict(self, self.spec, images, run, topk, batch_size)

    def _check_runs_whole(self: Any, name: str) -> None:
        if self.step_mode == "s":
            raise ValueError(f'{name} runs whole images: it does not go with step mode "s"')
