"""The spike train: T steps of a batch, which carries its own differentiable firing rate.

Shapes: T time steps, B images, C channels, S steps that are stored (1 where the input does not
change over time, else T). A tensor is *folded* when time lies in its first axis: (S*B, C, ...).

A module sees a spike train as one batch of shape (B, C, ...): the code of an unmodified timm or
torchvision network runs on it, because every torch function that it calls is looked up in the
table `RULES` (filled by `models.rules`) through `__torch_function__`.

A train belongs to one kind of pass for good:

- ``"rate"``   the stream has no graph; `SpikeTrain.rate` has one, made of the rules of rate-based
  backpropagation (Yu et al., NeurIPS 2024, arXiv 2410.11488, section 4);
- ``"graph"``  the stream has its own graph, as backpropagation through time (BPTT) needs;
- ``"plain"``  the stream alone, for inference;
- ``"plain_step"``  one step of inference, the membranes going to the `tape`;
- ``"step"``   one step of rate_s without a graph, what its rate needs going to the `tape`;
- ``"replay"`` the rates of rate_s with their graph, from the tape; the stream is the rate's value;
- ``"sltt"``, ``"ottt"``  one step with its own graph, for training that goes forward in time; under OTTT spikes carry
  their trace.

Streams are lazy: batch norm and sums stay pending *terms* until somebody needs the numbers. A neuron
consumes the terms as they are, in one pass; everything else asks for `folded`, `stream` or `rate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from models.layout import mean_over_steps
from models.linear_rate import Counts
from models.spike_bits import SpikeBits
from models.tape import Mean, Tape
from models.term import Term

Pass = Literal["rate", "graph", "plain", "plain_step", "step", "replay", "sltt", "ottt"]

RULES: dict[Any, Callable[..., Any]] = {}
"""What each torch function does to a spike train. Filled by `models.rules`."""

MAX_PENDING_TERMS = 4
"""A sum of more terms than this is added up at once: a long chain of residuals would keep every stream alive."""


class UnsupportedOperationError(TypeError):
    """A network asked of a spike train what has no rule; the message names the operation and the module."""


class SpikeTrain:
    """T steps of a batch of B images; see the module's text.

    Args:
        terms: the addends of the stream, all of shape (S*B, C, ...) with S in {1, T}.
        timesteps: T.
        kind: the kind of pass.
        tape: of the passes "plain_step", "step" and "replay".
    """

    __slots__ = ("_grad_enabled", "_rate", "kind", "tape", "terms", "timesteps")

    def __init__(self, terms: Iterable[Term], timesteps: int, kind: Pass, tape: Tape | None = None) -> None:
        self.terms = tuple(terms)
        self.timesteps = timesteps
        self.kind: Pass = kind
        self.tape = tape
        self._rate: Tensor | None = None
        self._grad_enabled = torch.is_grad_enabled()
        if len(self.terms) > MAX_PENDING_TERMS:
            self.single()

    # -- making one -------------------------------------------------------------------------------

    @classmethod
    def constant(cls, x: Tensor, timesteps: int, kind: Pass, tape: Tape | None = None) -> SpikeTrain:
        """The same input at each of `timesteps` steps (direct encoding); `x` is (B, C, ...)."""
        if kind in ("rate", "replay"):
            return cls([Term(x.detach(), 1, _rate=x)], timesteps, kind, tape)
        return cls([Term(x, 1)], timesteps, kind, tape)

    @classmethod
    def from_stream(cls, stream: Tensor, kind: Pass) -> SpikeTrain:
        """A stream (T, B, C, ...) that differs from step to step."""
        timesteps, folded = stream.shape[0], stream.flatten(0, 1)
        if kind == "rate":
            return cls([Term(folded.detach(), timesteps, _rate=mean_over_steps(folded, timesteps))], timesteps, kind)
        return cls([Term(folded, timesteps)], timesteps, kind)

    def derive(
        self,
        stream: Tensor | None,
        steps: int,
        *,
        rate: Tensor | None = None,
        link: Callable[[Tensor], Tensor] | None = None,
        counts: Counts | None = None,
        bits: SpikeBits | None = None,
        trace: Tensor | None = None,
    ) -> SpikeTrain:
        """A train of the same pass from a folded stream and, in a rate pass, its rate or the link that makes it."""
        if self.kind == "step" and link is not None:
            assert stream is not None and self.tape is not None
            self.tape.record(Mean).add(stream)
        if self.kind == "replay":
            assert self.tape is not None
            if link is not None:
                mean: Mean = self.tape.take()
                rate = link(mean.value(self.tape.timesteps).to(mean.dtype))
            assert rate is not None
            return self.of_terms(Term(rate.detach(), 1, _rate=rate, counts=counts))
        if self.kind != "rate":
            rate = link = None
        assert stream is not None
        return self.of_terms(Term(stream, steps, link=link, _rate=rate, counts=counts, bits=bits, trace=trace))

    def of_terms(self, *terms: Term) -> SpikeTrain:
        """A train of the same pass."""
        return SpikeTrain(terms, self.timesteps, self.kind, self.tape)

    # -- the numbers ------------------------------------------------------------------------------

    def on_streams(self, function: Callable[..., Any], *streams: Tensor) -> Any:
        """Runs the stream's part of a rule, which has a graph where streams have one; nothing in a replay.

        The streams come as arguments, computed before: what a rate needs on the way must not lose its graph.
        """
        if self.kind == "replay":
            return None
        with torch.set_grad_enabled(self.streams_have_graph and torch.is_grad_enabled()):
            return function(*streams)

    @property
    def streams_have_graph(self) -> bool:
        return self.kind in ("graph", "sltt", "ottt")

    @property
    def knows_one_step(self) -> bool:
        """Whether no other step is at hand: what is constant over time, and the rate of all steps, is unknown."""
        return self.kind in ("plain_step", "step", "replay")

    @property
    def has_rate(self) -> bool:
        """Whether the rate is a tensor of its own, with the graph of the rate rules."""
        return self.kind in ("rate", "replay")

    @property
    def trace(self) -> Tensor | None:
        """What stands for the spikes in the gradients of weights under OTTT; None elsewhere and for currents."""
        return self.terms[0].trace

    def single(self) -> Term:
        """The train as one term without a pending norm, computed once and kept."""
        if len(self.terms) == 1 and self.terms[0].norm is None:
            return self.terms[0]
        rate = self.rate if self.has_rate else None
        stream = rate.detach() if self.kind == "replay" else self.on_streams(self._sum_of_terms)  # type: ignore[union-attr]
        self.terms = (Term(stream, self.steps, _rate=rate),)
        return self.terms[0]

    def _sum_of_terms(self) -> Tensor:
        streams = [t.stream if t.norm is None else t.norm.on_stream(t.stream) for t in self.terms]
        parts = [s.unflatten(0, (t.steps, -1)) for s, t in zip(streams, self.terms, strict=True)]
        return functools.reduce(torch.add, parts).flatten(0, 1)

    @property
    def folded(self) -> Tensor:
        """The stored steps, (S*B, C, ...)."""
        return self.single().stream

    def release(self) -> None:
        """What a layer that has read the stream says: spikes stay as bits, until another one asks for the numbers."""
        for term in self.terms:
            term.release()

    @property
    def steps(self) -> int:
        """How many steps are stored: 1 if the train is constant over time, else T."""
        return max(t.steps for t in self.terms)

    @property
    def stream(self) -> Tensor:
        """All steps, (T, B, C, ...); a constant train is expanded, not copied."""
        stream = self.folded.unflatten(0, (self.steps, -1))
        return stream if self.steps == self.timesteps else stream.expand(self.timesteps, *stream.shape[1:])

    @property
    def rate(self) -> Tensor:
        """The mean over time, (B, C, ...), with the graph that this kind of pass gives it."""
        if self._rate is None and self.has_rate:
            # a monitor that looks under no_grad must not take the graph from everybody else
            with torch.set_grad_enabled(self._grad_enabled):
                self._rate = functools.reduce(torch.add, [t.rate() for t in self.terms])
        elif self._rate is None:
            self._rate = self.on_streams(lambda folded: mean_over_steps(folded, self.steps), self.folded)
        return self._rate  # type: ignore[return-value]

    # -- what the code of networks asks of a tensor -----------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """The shape of one step, (B, C, ...)."""
        return self.terms[0].shape

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return self.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.terms[0].dtype

    @property
    def device(self) -> torch.device:
        return self.terms[0].device

    @property
    def requires_grad(self) -> bool:
        return self.rate.requires_grad if self.has_rate else self.terms[0].stream.requires_grad

    def is_floating_point(self) -> bool:
        return True

    def new_empty(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._like().new_empty(*args, **kwargs)

    def new_ones(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._like().new_ones(*args, **kwargs)

    def _like(self) -> Tensor:
        """A tensor of the train's type and device."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"SpikeTrain(timesteps={self.timesteps}, shape={tuple(self.shape)}, kind={self.kind!r})"

    # -- dispatch ---------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        rule = RULES.get(func)
        if rule is None:
            raise UnsupportedOperationError(f"no rule for {_name(func)} on a spike train")
        return rule(*args, **(kwargs or {}))

    def __getattr__(self, name: str):
        method = getattr(torch.Tensor, name, None)
        if method is None or name.startswith("__"):
            raise AttributeError(f"a spike train has no attribute {name!r}")
        rule = RULES.get(method)
        if rule is None:
            raise UnsupportedOperationError(f"no rule for Tensor.{name} on a spike train")
        return functools.partial(rule, self)


def _operator(name: str) -> Callable:
    """Python looks operators up on the class: each goes to the rule of the tensor's operator, or is refused."""

    def call(self: SpikeTrain, *args: Any) -> Any:
        rule = RULES.get(getattr(torch.Tensor, name))
        if rule is None:
            raise UnsupportedOperationError(f"no rule for Tensor.{name} on a spike train")
        return rule(self, *args)

    return call


for _operator_name in (
    *("__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__"),
    *("__truediv__", "__itruediv__", "__rtruediv__", "__neg__", "__getitem__", "__setitem__", "__pow__", "__rpow__"),
    *("__matmul__", "__rmatmul__", "__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__floordiv__"),
    *("__mod__", "__abs__", "__bool__", "__float__", "__int__"),
):
    setattr(SpikeTrain, _operator_name, _operator(_operator_name))
SpikeTrain.__hash__ = object.__hash__  # type: ignore[method-assign]  # __eq__ is refused, identity still counts


def _name(func: Any) -> str:
    module = getattr(func, "__module__", None) or "torch.Tensor"
    return f"{module}.{getattr(func, '__name__', repr(func))}"
