"""One addend of a lazy stream.

Shapes: B images, C channels, S steps that are stored (1 where the input does not change over time, else T). A tensor is
*folded* when time lies in its first axis: (S*B, C, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.layout import mean_over_steps
from models.linear_rate import Counts
from models.normalization import Norm


@dataclass(slots=True, eq=False)
class Term:
    """One addend of a lazy stream: ``norm(stream)``, with the rate of the stream *before* the norm.

    Args:
        stream: (S*B, C, ...), folded.
        steps: S, either 1 (constant over time) or T.
        link: given the mean of `stream` over time, returns it as a tensor with the graph of the rate
            rule that made this term; None outside of a rate pass.
        norm: an affine map per channel that is still to be applied to both.
        counts: the rate, in a quarter of its memory, where it is that of a layer of neurons.
        trace: of an OTTT pass, what stands for the spikes in the gradients of weights: (B, C, ...), without a graph.
    """

    stream: Tensor
    steps: int
    link: Callable[[Tensor], Tensor] | None = None
    norm: Norm | None = None
    _rate: Tensor | None = None
    counts: Counts | None = None
    trace: Tensor | None = None
    _grad_enabled: bool = field(default_factory=torch.is_grad_enabled)

    def rate_before_norm(self, value: Tensor | None = None) -> Tensor:
        """The rate before `norm`, (B, C, ...); `value` is the mean of the stream where it is known already."""
        if self._rate is None:
            assert self.link is not None, "only a rate pass has rates"
            # whoever asks first, even a monitor under no_grad, asks for all who hold this term
            with torch.set_grad_enabled(self._grad_enabled):
                self._rate = self.link(mean_over_steps(self.stream, self.steps) if value is None else value)
            self.link = None
        return self._rate

    def rate(self) -> Tensor:
        rate = self.rate_before_norm()
        return rate if self.norm is None else self.norm.on_rate(rate)
