"""The maps of a feedback loop: a linear layer, its norm and a dropout whose mask is one for all time steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spikingjelly.activation_based.base import MemoryModule
from torch import Tensor, nn

from models.feedback.averages import average_over_steps
from models.linear_rate import WithValue
from models.moments import moments
from models.normalization import Norm, update_running
from models.ranks import active_group, moments_over_ranks
from models.spiketrain import SpikeTrain
from models.term import Term


class Current(nn.Module):
    """What spikes become on their way to the next layer's membranes: (B, C_in, ...) -> (B, C_out, ...).

    Args:
        linear: a convolution, transposed convolution or linear layer.
        norm: behind it, or None.
        dropout: probability that a neuron's current is dropped.
    """

    def __init__(self, linear: nn.Module, norm: AverageNorm | None, dropout: float) -> None:
        super().__init__()
        self.linear = linear
        self.norm = norm
        self.drop = PassDropout(dropout)

    def forward(self, x):
        x = self.linear(x)
        return self.drop(x if self.norm is None else self.norm(x))


class PassDropout(MemoryModule):
    """Dropout with one mask for all time steps and for the rates, as the papers have it.

    Its mask is drawn when a pass needs it and forgotten by `reset`.
    """

    mask: Tensor | None

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.register_memory("mask", None)

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if self.mask is None:
            self.mask = F.dropout(x.new_ones(x.shape), self.p, True)
        return x * self.mask

    def extra_repr(self) -> str:
        return f"p={self.p}"


class AverageNorm(nn.BatchNorm2d):
    """Batch norm in a feedback network: its statistics in training are those of averages over time.

    Of the input's current they are this batch's, and all time steps are normalised with them. Inside of the loop the
    averages are not known before the steps have run: steps are normalised with the running statistics, which move when
    the loop is applied to the averages (Xiao et al., NeurIPS 2021, the authors' code).

    Args:
        channels: C.
        leak: of the neurons, which weighs the average.
    """

    def __init__(self, channels: int, leak: float) -> None:
        super().__init__(channels)
        self.leak = leak

    def forward(self, x):
        if not isinstance(x, SpikeTrain):
            return super().forward(x)
        if self.training and x.kind == "rate":
            return self._of_batch(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _of_batch(self, x: SpikeTrain) -> SpikeTrain:
        term, group = x.single(), active_group()
        average = average_over_steps(term.stream, term.steps, self.leak)
        rate = WithValue.apply(term.rate_before_norm(average), average)
        mean, var = moments(average, 1)
        count: int | Tensor = average.numel() // average.shape[1]
        if group is not None:
            mean, var, count = moments_over_ranks(mean, var, count, group)  # type: ignore[arg-type]
        elif count == 1:
            raise ValueError(f"batch norm in training takes more than 1 value per channel, found {tuple(x.shape)}")
        assert self.momentum is not None and self.num_batches_tracked is not None
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            update_running(self.running_mean, self.running_var, mean, var, self.momentum, count)
        norm = Norm(mean, torch.rsqrt(var + self.eps), self.weight, self.bias, of_batch=True, group=group)
        return x.of_terms(Term(term.stream, term.steps, norm=norm, _rate=rate))

    def scale(self) -> Tensor:
        """What steps inside of the loop are multiplied by, (C,), without a graph."""
        assert self.running_var is not None
        return self.weight.detach() * torch.rsqrt(self.running_var + self.eps)
