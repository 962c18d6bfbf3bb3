"""The spiking neuron: a SpikingJelly memory module that also runs on whole spike trains.

On plain tensors it is a SpikingJelly neuron (one step a call, or all steps with ``step_mode="m"``; state in `v`,
`functional.reset_net` clears it). On a `SpikeTrain` it runs as the kind of pass says, from rest and back to rest.
"""

from __future__ import annotations

import math

import torch
from spikingjelly.activation_based import surrogate
from spikingjelly.activation_based.neuron import SimpleBaseNode
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models.dynamics import Leak, NeuronConfig
from models.firing import Affine, Means, fire, fire_next, fire_once, fire_with_rate, means_of_steps
from models.layout import at_least_float32
from models.linear_rate import Counts
from models.norm_backward import norms_backward
from models.normalization import Norm
from models.spike_bits import SpikeBits
from models.spiketrain import SpikeTrain
from models.tape import Membrane
from models.term import Term


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
        if config.learnable_leak:  # SpikingJelly's `ParametricLIFNode` has the same parameter: 1/tau = sigmoid(w)
            self.w = nn.Parameter(torch.tensor(math.log(1 / config.leak - 1)))
        self.online: nn.Module | None = None
        """SpikingJelly's node of the algorithm where that is an online one (`models.online`)."""
        self.calls_per_step = 1
        """How often the network calls this module in one step (set by the probe of a spiking twin)."""

    @property
    def leak(self) -> Leak:
        """The leak, with its graph where it is learned: 1 - sigmoid(w) (Fang et al., ICCV 2021, equation 10)."""
        return 1 - torch.sigmoid(self.w) if self.config.learnable_leak else self.config.leak

    def forward(self, x: SpikeTrain | Tensor) -> SpikeTrain | Tensor:
        if not isinstance(x, SpikeTrain):
            return super().forward(x)
        return getattr(self, f"_{x.kind}_pass")(x)

    def _plain_pass(self, x: SpikeTrain) -> SpikeTrain:
        with torch.no_grad():
            streams, maps, steps = _currents(x)
            return x.derive(fire(streams, maps, steps, x.timesteps, self.config, self.leak), x.timesteps)

    def _plain_step_pass(self, x: SpikeTrain) -> SpikeTrain:
        """Inference a step at a time; the membranes lie on the tape, where each call of this module has its own."""
        assert x.tape is not None
        membrane = x.tape.record(Membrane)
        with torch.no_grad():
            streams, maps, _ = _currents(x)
            spikes, membrane.state = fire_next(streams, maps, membrane.state, self.config, self.leak)
        return x.derive(spikes, 1)

    def _rate_pass(self, x: SpikeTrain) -> SpikeTrain:
        with torch.no_grad():
            streams, maps, steps = _currents(x)
            averaged = [term.rate_is_pending and term.steps > 1 for term in x.terms]
            spikes, bits, means = fire_with_rate(streams, maps, steps, x.timesteps, self.config, self.leak, averaged)
            for term, average in zip(x.terms, means.addends, strict=True):
                if average is not None:
                    term.rate_before_norm(average)
        return x.derive(
            spikes,
            x.timesteps,
            rate=self._linked(x, means),
            counts=_packed(means, x.timesteps),
            bits=SpikeBits(bits, x.timesteps, spikes.dtype),
        )

    def _step_pass(self, x: SpikeTrain) -> SpikeTrain:
        """rate_s: one step without a graph; the state lies on the tape, where each call of this module has its own."""
        assert x.tape is not None
        membrane = x.tape.record(Membrane)
        streams, maps, _ = _currents(x)
        spikes, membrane.state = fire_once(streams, maps, membrane.state, self.config, self.leak)
        membrane.like = torch.empty_like(spikes, device="meta")
        return x.derive(spikes, 1)

    def _replay_pass(self, x: SpikeTrain) -> SpikeTrain:
        """rate_s: the graph of what the steps left on the tape."""
        assert x.tape is not None
        membrane, timesteps = x.tape.take(), x.tape.timesteps
        means = means_of_steps(membrane.state, timesteps, membrane.like)
        return x.derive(None, 1, rate=self._linked(x, means), counts=_packed(means, timesteps))

    def _linked(self, x: SpikeTrain, means: Means) -> Tensor:
        """The rate with its graph."""
        norms = [term.norm for term in x.terms]
        inputs = [_rate_inputs(term) for term in x.terms]
        leak = self.leak if means.chi is not None else None
        tensors = [tensor for triple in inputs for tensor in triple]
        return _FireRate.apply(means.rate, means.kappa, means.chi, leak, norms, *tensors)

    def _graph_pass(self, x: SpikeTrain) -> SpikeTrain:
        """Backpropagation through time."""
        kept, self.v = self.v, 0.0  # the state of a caller who steps by hand is none of this pass's business
        try:
            spikes = torch.stack([self._step(current) for current in x.stream])
        finally:
            self.v = kept
        return x.derive(spikes.flatten(0, 1), x.timesteps)

    def _ottt_pass(self, x: SpikeTrain) -> SpikeTrain:
        spikes, trace = self._online_node()(at_least_float32(x.folded))
        return x.derive(spikes.to(x.dtype), 1, trace=trace.to(x.dtype))

    def _sltt_pass(self, x: SpikeTrain) -> SpikeTrain:
        return x.derive(self._online_node()(at_least_float32(x.folded)).to(x.dtype), 1)

    def _online_node(self) -> nn.Module:
        """The node in training mode, whatever this part of the network is in: else it has no trace and no gradient."""
        assert self.online is not None, "set_algorithm gives every neuron its node"
        self.online.step_mode = "s"  # type: ignore[assignment]  # SpikingJelly's set_step_mode(network, "m") reaches it, too
        return self.online.train()

    def single_step_forward(self, x: Tensor) -> Tensor:
        """One step on a plain tensor (B, C, ...); the membrane is kept in `v`, at least in float32."""
        if self.calls_per_step > 1:
            raise RuntimeError(
                f"this neuron is called {self.calls_per_step} times a step and holds one membrane: "
                "the network runs on whole images, but not step by step"
            )
        return self._step(x)

    def _step(self, x: Tensor) -> Tensor:
        return super().single_step_forward(at_least_float32(x)).to(x.dtype)

    def neuronal_charge(self, x: Tensor) -> None:
        """u_t = leak * v_{t-1} + c_t."""
        self.v = self.leak * self.v + x

    def extra_repr(self) -> str:
        c = self.config
        reset = f"{c.reset}, detached" if c.detach_reset else c.reset
        leak = f"{c.leak}, learned" if c.learnable_leak else c.leak
        return f"leak={leak}, threshold={c.threshold}, reset={reset}, alpha={c.alpha}"


def _packed(means: Means, timesteps: int) -> Counts | None:
    return None if means.counts is None else Counts(means.counts, timesteps)


def _currents(x: SpikeTrain) -> tuple[list[Tensor], list[Affine], list[int]]:
    """The addends of the input current, the scale and shift of each, and how many steps, or bytes of bits, it stores.

    Spikes that only bits are left of are given as bits; the first addend, whose type and memory format the layer's
    spikes get, is given as numbers.
    """
    maps = [None if term.norm is None else term.norm.scale_and_shift() for term in x.terms]
    membrane = torch.promote_types(x.dtype, torch.float32)
    streams, steps = [_numbers(x.terms[0])], [x.terms[0].steps]
    for term in x.terms[1:]:
        bits = term.bits if term.numbers is None else None
        if bits is not None and torch.promote_types(bits.dtype, torch.float32) == membrane:
            streams.append(bits.bytes)
            steps.append(bits.bytes_per_neuron)
        else:  # spikes in float64 make the sum float64, which bits would not
            streams.append(_numbers(term))
            steps.append(term.steps)
    return streams, maps, steps


def _numbers(term: Term) -> Tensor:
    stream = term.stream
    return stream.float() if stream.dtype == torch.uint8 else stream  # to the kernels uint8 is spikes as bits


def _rate_inputs(term: Term) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if term.norm is None:
        return term.rate_before_norm(), None, None
    return term.rate_before_norm(), term.norm.weight, term.norm.bias


class _FireRate(Function):
    """dr/dcbar = kappa, and from cbar on through the pending batch norms to each term's rate; dr/dleak = chi.

    Args:
        rate, kappa: mean spikes and their derivative, (B, C, ...).
        chi: their derivative with respect to the leak, or None.
        leak: the learned leak, a scalar, or None.
        norms: the pending norm of each term, or None.
        inputs: for each term its rate before the norm, the norm's weight and the norm's bias.
    """

    @staticmethod
    def forward(ctx, rate, kappa, chi, leak, norms: list[Norm | None], *inputs):
        # a term without a norm needs no value to pass its gradient on: only its shape, which is kappa's
        saved = [inputs[i] if norms[i // 3] is not None else None for i in range(len(inputs))]
        ctx.save_for_backward(kappa, chi, *saved)
        ctx.norms = norms
        return rate

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kappa, chi, *saved = ctx.saved_tensors
        needs = [tuple(ctx.needs_input_grad[5 + i : 8 + i]) for i in range(0, len(saved), 3)]
        grads = norms_backward(grad, kappa, ctx.norms, saved[0::3], saved[1::3], needs)
        grad_leak = None
        if chi is not None and ctx.needs_input_grad[3]:
            dtype = torch.promote_types(chi.dtype, torch.float32)
            grad_leak = (grad.to(dtype) * chi.to(dtype)).sum()
        return None, None, None, grad_leak, None, *grads
