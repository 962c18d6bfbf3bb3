"""The inner loop of a training step: forward and backward passes of one batch, before the optimizer moves.

Most rules run all time steps in one forward pass and go back once (`once`). The online ones go forward and back at
each step, and their gradients add up to one step of the optimizer (`each_step`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

Losses = Callable[[Any, Tensor], dict[str, Tensor]]
"""From what a model gives and the labels (B,) to scalars by name; "total" is minimised."""

Backward = Callable[[Accelerator, nn.Module, Tensor, Tensor, int], dict[str, Tensor]]
"""From the wrapped model, images, labels and the number of optimizer steps before this one to the scalars by name,
detached; gradients are added to `.grad`. Labels are (B,), or probabilities (B, K) of mixed images."""


def once(losses: Losses, **options: Any) -> Backward:
    """One forward and one backward pass.

    Args:
        options: keyword arguments of the model's forward pass.
    """

    def backward(
        accelerator: Accelerator, model: nn.Module, images: Tensor, labels: Tensor, step: int
    ) -> dict[str, Tensor]:
        parts = losses(model(images, **options), labels)
        accelerator.backward(parts["total"])
        return {name: value.detach() for name, value in parts.items()}

    return backward


def each_step(losses: Losses, timesteps: int) -> Backward:
    """``model(images, step=t)`` for t = 0 to T - 1, a backward pass behind each.

    The loss is the mean over the steps of `losses`: each step's counts 1/T. Processes exchange gradients once, in the
    last step's backward pass, and only in the batches in which the optimizer moves.

    Args:
        losses: of the logits (B, K) of one step.
        timesteps: T.
    """

    def backward(
        accelerator: Accelerator, model: nn.Module, images: Tensor, labels: Tensor, step: int
    ) -> dict[str, Tensor]:
        means: dict[str, Tensor] = {}
        for t in range(timesteps):
            last = t == timesteps - 1
            # DDP decides in the forward pass whether the backward pass behind it exchanges gradients
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                parts = losses(model(images, step=t), labels)
                accelerator.backward(parts["total"] / timesteps)
            for name, value in parts.items():
                means[name] = means.get(name, 0.0) + value.detach() / timesteps  # type: ignore[operator]
        return means

    return backward
