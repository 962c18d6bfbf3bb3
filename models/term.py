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
from models.spike_bits import SpikeBits


@dataclass(slots=True, eq=False)
class Term:
    """One addend of a lazy stream: ``norm(stream)``, with the rate of the stream *before* the norm.

    Args:
        numbers: the stream, (S*B, C, ...), folded; None once released: then `bits` hold it.
        steps: S, either 1 (constant over time) or T.
        link: given the mean of `stream` over time, returns it as a tensor with the graph of the rate
            rule that made this term; None outside of a rate pass.
        before: the term whose stream this is, where its rate is still to be computed: before the norm it is this one's.
        norm: an affine map per channel that is still to be applied to both.
        counts: the rate, in a quarter of its memory, where it is that of a layer of neurons.
        bits: the stream in little memory, where it is spikes of a rate pass. Numbers that are changed in place (by a
            hook) are not: whoever reads them later is given the bits.
        trace: of an OTTT pass, what stands for the spikes in the gradients of weights: (B, C, ...), without a graph.
    """

    numbers: Tensor | None
    steps: int
    link: Callable[[Tensor], Tensor] | None = None
    before: Term | None = None
    norm: Norm | None = None
    _rate: Tensor | None = None
    counts: Counts | None = None
    bits: SpikeBits | None = None
    trace: Tensor | None = None
    _grad_enabled: bool = field(default_factory=torch.is_grad_enabled)

    @property
    def stream(self) -> Tensor:
        """(S*B, C, ...), folded; made from the bits where it was let go of."""
        if self.numbers is not None:
            return self.numbers
        assert self.bits is not None
        return self.bits.stream()

    def release(self) -> None:
        """Lets go of the numbers where there are bits: those who hold this term mostly do so only for later."""
        if self.bits is not None:
            self.numbers = None

    @property
    def shape(self) -> torch.Size:
        """Of one step, (B, C, ...)."""
        if self.numbers is None:
            assert self.bits is not None
            return self.bits.shape
        return torch.Size((self.numbers.shape[0] // self.steps, *self.numbers.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.numbers.dtype if self.numbers is not None else self.bits.dtype  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device:
        return self.numbers.device if self.numbers is not None else self.bits.bytes.device  # type: ignore[union-attr]

    @property
    def rate_is_pending(self) -> bool:
        """Whether the rate is still to be computed from the stream."""
        return self._rate is None if self.before is None else self.before.rate_is_pending

    def rate_before_norm(self, value: Tensor | None = None) -> Tensor:
        """The rate before `norm`, (B, C, ...); `value` is the mean of the stream where it is known already."""
        if self.before is not None:
            self._rate, self.before = self.before.rate_before_norm(value), None
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
