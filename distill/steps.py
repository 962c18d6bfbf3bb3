"""Looks after single steps of the optimizer: one whose loss or gradient is no number leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.meters import Progress

MOST_OVERFLOWS = 50
"""Steps in a row that a scaler of gradients may skip. It halves a scale of 2^16 each time: behind them it is 2^-34, and
gradients that are still no numbers never will be."""


class NonFiniteLossError(RuntimeError):
    """The loss, or its gradient, is no number any more."""


class StepGuard:
    """Holds what a step counts until it is known to be good, and the network's buffers as they were before it.

    A bad batch spoils running statistics in its forward pass already: they are put back, or every later evaluation
    would be NaN.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self._accelerator, self._model = accelerator, model
        self._buffers = list(model.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]
        self._pending: list[tuple[Mapping[str, Tensor], int, Mapping[str, Tensor], Mapping[str, Tensor]]] = []
        self._last: list[Mapping[str, Tensor]] = []

    def before_pass(self) -> None:
        """Call it before each forward pass: the first of a step keeps the buffers."""
        if not self._pending:
            _copy(self._before, self._buffers)

    def after_pass(
        self,
        parts: Mapping[str, Tensor],
        images: int,
        rates: Mapping[str, Tensor],
        backward: Mapping[str, Tensor],
    ) -> None:
        """Takes the parts of the loss of a batch of so many images, the firing rates if they were looked at, and what
        was said of the backward pass."""
        self._pending.append((parts, images, rates, backward))

    def finite(self, norm: Tensor | None) -> bool:
        """Whether the step's losses and gradients are numbers, on this process. Waits for the device.

        With float16 the gradients are the scaler's to judge, which looks for a scale and skips steps meanwhile.

        Args:
            norm: of all gradients together, where clipping has found it already.
        """
        total = torch.stack([parts["total"].detach().float() for parts, *_ in self._pending]).sum()
        if self._accelerator.scaler is None:
            if norm is None:
                grads = [p.grad for p in self._model.parameters() if p.grad is not None]
                norm = torch.nn.utils.get_total_norm(grads)
            total = total + norm.float().to(total.device)
        return math.isfinite(float(total))

    def keep(self, progress: Progress) -> None:
        """The step was good: what it counted counts."""
        for parts, images, rates, backward in self._pending:
            progress.losses.add(parts, images)
            progress.rates.add(rates, images)
            progress.backward.add(backward, images)
        progress.skipped_in_a_row = progress.overflowed_in_a_row = 0
        self._pending.clear()

    def skip(self, progress: Progress, overflowed: bool) -> None:
        """The step was bad: the buffers are as before it.

        Args:
            overflowed: whether its loss was a number, and float16 too small for its gradients.
        """
        _copy(self._buffers, self._before)
        progress.skipped += 1
        progress.overflowed_in_a_row = progress.overflowed_in_a_row + 1 if overflowed else 0
        progress.skipped_in_a_row = 0 if overflowed else progress.skipped_in_a_row + 1
        self._last = [parts for parts, *_ in self._pending]
        self._pending.clear()

    def parts(self) -> str:
        """The parts of the loss of the bad step, for people."""
        return "; ".join(", ".join(f"{n} {v.item():g}" for n, v in parts.items()) for parts in self._last)


@torch.no_grad()
def _copy(into: list[Tensor], of: list[Tensor]) -> None:
    """A GPU's kernel for all tensors of a type, not one for each: the buffers of batch norms are small and many."""
    for dtype in {x.dtype for x in of}:
        torch._foreach_copy_([x for x in into if x.dtype == dtype], [x for x in of if x.dtype == dtype])
