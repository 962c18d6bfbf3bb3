"""The spiking neuron: a SpikingJelly memory module that also runs on whole spike trains.

On plain tensors it is a SpikingJelly neuron (one step a call, or all steps with ``step_mode="m"``; state in `v`,
`functional.reset_net` clears it). On a `SpikeTrain` it runs all steps at once, from rest and back to rest.
"""

from __future__ import annotations

import torch
from spikingjelly.activation_based import surrogate
from spikingjelly.activation_based.neuron import SimpleBaseNode
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models.dynamics import NeuronConfig
from models.kernels import fire, fire_with_rate
from models.normalization import Norm
from models.spiketrain import SpikeTrain, Term


class SpikingNeuron(SimpleBaseNode):
    """A layer of leaky integrate-and-fire neurons; see `models.dynamics` for the equations.

    Args:
        config: leak, threshold, reset and surrogate of the neurons.

    Takes a `SpikeTrain` (B, C, ...) or plain tensors as SpikingJelly's own nodes do; returns the same kind.
    """

    v: Tensor | float
    """The membrane that the last step on plain tensors left; 0.0 at rest."""

    def __init__(self, config: NeuronConfig | None = None) -> None:
        config = config or NeuronConfig()
        super().__init__(
            v_threshold=config.threshold,
            v_reset=None if config.reset == "soft" else 0.0,
            surrogate_function=surrogate.Sigmoid(alpha=config.alpha),
            detach_reset=config.detach_reset,
        )
        self.config = config
        self.calls_per_step = 1
        """How often the network calls this module in one step (set by the probe of a spiking twin)."""

    def forward(self, x: SpikeTrain | Tensor) -> SpikeTrain | Tensor:
        if not isinstance(x, SpikeTrain):
            return super().forward(x)
        if x.kind == "graph":
            return self._backpropagation_through_time(x)
        currents = (
            [term.stream for term in x.terms],
            [term.steps for term in x.terms],
            [None if term.norm is None else term.norm.scale_and_shift() for term in x.terms],
        )
        if x.kind == "plain":
            with torch.no_grad():
                return x.derive(fire(*currents, x.timesteps, self.config), x.timesteps)
        with torch.no_grad():
            spikes, rate, kappa = fire_with_rate(*currents, x.timesteps, self.config)
        norms = [term.norm for term in x.terms]
        inputs = [_rate_inputs(term) for term in x.terms]
        rate = _FireRate.apply(rate, kappa, norms, *[tensor for triple in inputs for tensor in triple])
        return x.derive(spikes, x.timesteps, rate=rate)

    def _backpropagation_through_time(self, x: SpikeTrain) -> SpikeTrain:
        kept, self.v = self.v, 0.0  # the state of a caller who steps by hand is none of this pass's business
        spikes = torch.stack([self._step(current) for current in x.stream])
        self.v = kept
        return x.derive(spikes.flatten(0, 1), x.timesteps)

    def single_step_forward(self, x: Tensor) -> Tensor:
        """One step on a plain tensor (B, C, ...); the membrane is kept in `v`, at least in float32."""
        if self.calls_per_step > 1:
            raise RuntimeError(
                f"this neuron is called {self.calls_per_step} times a step and holds one membrane: "
                "the network runs on whole images, but not step by step"
            )
        return self._step(x)

    def _step(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return super().single_step_forward(x.to(dtype)).to(x.dtype)

    def neuronal_charge(self, x: Tensor) -> None:
        """u_t = leak * v_{t-1} + c_t."""
        self.v = self.config.leak * self.v + x

    def extra_repr(self) -> str:
        c = self.config
        reset = f"{c.reset}, detached" if c.detach_reset else c.reset
        return f"leak={c.leak}, threshold={c.threshold}, reset={reset}, alpha={c.alpha}"


def _rate_inputs(term: Term) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if term.norm is None:
        return term.rate_before_norm(), None, None
    return term.rate_before_norm(), term.norm.weight, term.norm.bias


class _FireRate(Function):
    """dr/dcbar = kappa, and from cbar on through the pending batch norms to each term's rate.

    Args:
        rate, kappa: mean spikes and their derivative, (B, C, ...).
        norms: the pending norm of each term, or None.
        inputs: for each term its rate before the norm, the norm's weight and the norm's bias.
    """

    @staticmethod
    def forward(ctx, rate, kappa, norms: list[Norm | None], *inputs):
        # a term without a norm needs no value to pass its gradient on: only its shape, which is kappa's
        saved = [inputs[i] if norms[i // 3] is not None else None for i in range(len(inputs))]
        ctx.save_for_backward(kappa, *saved)
        ctx.norms = norms
        return rate

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kappa, *saved = ctx.saved_tensors
        grad_current = grad * kappa
        grads: list[Tensor | None] = []
        for i, norm in enumerate(ctx.norms):
            if norm is None:
                grads += [grad_current, None, None]
                continue
            rate, weight, _ = saved[3 * i : 3 * i + 3]
            grads += norm.backward(grad_current, rate, weight, tuple(ctx.needs_input_grad[3 + 3 * i : 6 + 3 * i]))
        return None, None, None, *grads
