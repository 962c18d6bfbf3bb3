"""Who can take the scale of a spike: found by sending an image through the analogue network with the units noted down.

A *site* is one call of an activation that is a neuron in the twin. Each of its channels has a *unit*, a number from 1
on: the value that one of its spikes stands for. Unit 0 is that of ordinary real numbers, whose value is 1. What is
linear in the spikes (convolution, linear layer, batch norm) can absorb their values, so that real numbers come out of
it; a layer whose output only one site reads can have that output divided by any scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from models.neuron import SpikingNeuron
from models.spiketrain import UnsupportedOperationError
from models.traversal import path_in_traceback
from models.twin import OnRate


class _Refusal(Exception):
    """What becomes an `UnsupportedOperationError`; a TypeError would be taken for "ask the other operand" by ``+``."""


@dataclasses.dataclass(eq=False)
class Layer:
    """A convolution, linear layer or batch norm, called once a step."""

    name: str
    input_units: Tensor
    """Unit of each input channel, (C_in,)."""
    output_units: Tensor | None = None
    """Units of the spikes that are added to its output, (C_out,): the output must be in the same; None for no such."""
    readers: list[str] = dataclasses.field(default_factory=list)
    """What reads the output alone or in a sum of real numbers."""
    sum_readers: list[str] = dataclasses.field(default_factory=list)
    """What reads a sum of the output with something whose scale is given."""
    can_shift: bool = True
    """Whether a constant that is added to the output arrives at its reader as it is."""


@dataclasses.dataclass(eq=False)
class Site:
    """One call of a neuron layer."""

    name: str
    units: Tensor
    """Unit of each channel of its spikes, (C,)."""
    layers: tuple[Layer, ...]
    """Whose sum, with the spikes of `input_units` where there are any, is its input."""
    input_units: Tensor | None
    """Units of its input, (C,), where spikes are in it; None where the input's scale is free."""

    @property
    def shifted(self) -> tuple[Layer, ...]:
        """Those of the layers that may add a constant to the input of this site: no other site reads it."""
        given = self.input_units is not None
        return tuple(a for a in self.layers if a.can_shift and (a.sum_readers if given else a.readers) == [self.name])


@dataclasses.dataclass(frozen=True, eq=False)
class _Tag:
    """What is known of a tensor (B, C, ...)."""

    units: Tensor
    layers: tuple[Layer, ...] = ()
    """The addends that are the output of a layer."""
    fixed: bool = True
    """Whether there are other addends: the scale of the sum is then given."""

    @property
    def real(self) -> bool:
        return not self.units.any()

    @property
    def free(self) -> bool:
        return self.real and not self.fixed

    def read_by(self, reader: str) -> None:
        for layer in self.layers:
            (layer.sum_readers if self.fixed else layer.readers).append(reader)


@dataclasses.dataclass(eq=False)
class Trace:
    """Sites and layers in the order of their calls."""

    names: dict[int, str]
    """Name of the module that owns a weight, by the weight's `id`."""
    sites: list[Site] = dataclasses.field(default_factory=list)
    layers: dict[str, Layer] = dataclasses.field(default_factory=dict)
    units: int = 1
    """How many units there are."""

    def layer(self, weight: Any, tag: _Tag, kind: str) -> _Tag:
        """The output of a layer, whose input has `tag`."""
        name = self.names.get(id(weight))
        if name is None:
            raise _Refusal(f"the weight of a {kind} is no parameter of a module: no scale goes into it")
        if name in self.layers:
            raise _Refusal(f"{name!r} is called twice in one pass: its weights cannot take two scales")
        tag.read_by(name)
        layer = self.layers[name] = Layer(name, tag.units)
        return _Tag(torch.zeros(weight.shape[0], dtype=torch.long), (layer,), fixed=False)

    def site(self, name: str, tag: _Tag, channels: int) -> _Tag:
        if not tag.free and bool((tag.units == 0).any()):
            raise _Refusal(f"nothing before {name!r} can take the scale of its input")
        tag.read_by(name)
        units = torch.arange(self.units, self.units + channels)
        self.units += channels
        self.sites.append(Site(name, units, tag.layers, None if tag.free else tag.units))
        return _Tag(units)

    def check(self) -> None:
        """Every output that is scaled must have one reader.

        Raises:
            UnsupportedOperationError: names the layer that has more and those who read it.
        """
        free = {layer for site in self.sites if site.input_units is None for layer in site.layers}
        for layer in self.layers.values():
            if layer not in free and layer.output_units is None:
                continue
            readers = layer.readers + (layer.sum_readers if layer.output_units is None else [])
            if len(readers) > 1:
                raise _Refusal(
                    f"the output of {layer.name!r} is read by {', '.join(map(repr, readers))}: it cannot take the "
                    "scale of one of them"
                )


def trace_scales(ann: nn.Module, twin: nn.Module, images: Tensor) -> Trace:
    """Runs images (B, C, H, W) through a network in evaluation mode and notes which layer can absorb which scale.

    Args:
        twin: a spiking twin of it, which says what became a neuron and what stayed analogue in a gate.

    Raises:
        UnsupportedOperationError: names the operation that is not known to keep scales and the module that asked for
            it, or the module whose input, or the layer whose output, cannot be scaled.
    """
    trace = Trace({id(p): name.rpartition(".")[0] for name, p in ann.named_parameters() if name.endswith("weight")})
    handles = []
    for name, module in twin.named_modules():
        if isinstance(module, (SpikingNeuron, OnRate)):
            activation = ann.get_submodule(name)
            tags: list[_Tag] = []
            handles.append(activation.register_forward_pre_hook(_plain_input(tags)))
            after = _new_scale if isinstance(module, SpikingNeuron) else _real_numbers
            handles.append(activation.register_forward_hook(after(trace, name, tags)))
    try:
        with torch.no_grad():
            output = ann(_traced(images, _Tag(torch.zeros(images.shape[1], dtype=torch.long)), trace))
        if not isinstance(output, _Traced) or not output.tag.real:
            raise _Refusal("no layer behind the last neurons takes their scale")
        output.tag.read_by("the output")
        trace.check()
    except _Refusal as error:
        where = path_in_traceback(ann, error)
        raise UnsupportedOperationError(f"{type(ann).__name__} cannot be calibrated: {error}, in {where}") from error
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _plain_input(tags: list[_Tag]) -> Callable:
    def hook(module: nn.Module, args: tuple) -> tuple[Tensor]:
        tags.append(args[0].tag)
        return (args[0].as_subclass(Tensor).clone(),)  # an activation in place must not change what others read

    return hook


def _new_scale(trace: Trace, name: str, tags: list[_Tag]) -> Callable:
    return lambda module, args, output: _traced(output, trace.site(name, tags.pop(), output.shape[1]), trace)


def _real_numbers(trace: Trace, name: str, tags: list[_Tag]) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        tag = tags.pop()
        if not tag.real:
            raise _Refusal(f"no layer between the spikes and {name!r}, which is analogue, takes their scale")
        tag.read_by(name)
        return _traced(output, _Tag(tag.units), trace)

    return hook


# -- a tensor that knows its units -----------------------------------------------------------------


class _Traced(Tensor):
    tag: _Tag
    its_trace: Trace

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*plain_args, **plain_kwargs)
        several = isinstance(result, (tuple, list)) and any(isinstance(part, Tensor) for part in result)
        if not isinstance(result, Tensor) and not several:
            return result  # a shape and the like
        if func not in _RULES:
            raise _Refusal(f"{_name(func)} is not known to keep the scale of spikes")
        tags = _RULES[func](result, *args, **kwargs)
        trace = next(x for x in _flat(args) + list(kwargs.values()) if isinstance(x, _Traced)).its_trace
        if several:
            return type(result)(_traced(part, tag, trace) for part, tag in zip(result, tags, strict=True))
        return _traced(result, tags, trace)


def _plain(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, _Traced) else x


def _flat(args: tuple) -> list:
    return [part for arg in args for part in (arg if isinstance(arg, (tuple, list)) else (arg,))]


def _traced(x: Tensor, tag: _Tag, trace: Trace) -> _Traced:
    result = x.as_subclass(_Traced)
    result.tag, result.its_trace = tag, trace
    return result


def _name(func: Any) -> str:
    return f"{getattr(func, '__module__', None) or 'torch.Tensor'}.{getattr(func, '__name__', repr(func))}"


_RULES: dict[Any, Callable[..., Any]] = {}
"""The tag of the result of each function, or those of its results, given the result and the arguments."""


def _rule(*functions: Any) -> Callable:
    def register(rule: Callable) -> Callable:
        _RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


@_rule(F.conv1d, F.conv2d, F.conv3d, F.linear)
def _linear(result, x, weight, bias=None, *args, **kwargs):
    return x.its_trace.layer(weight, x.tag, "linear map")


@_rule(F.batch_norm)
def _batch_norm(result, x, running_mean, running_var, weight=None, bias=None, *args, **kwargs):
    if weight is None or running_mean is None:
        raise _Refusal("a batch norm without weights or running statistics takes no scale")
    return x.its_trace.layer(weight, x.tag, "batch norm")


@_rule(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
@_rule(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
@_rule(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
@_rule(F.interpolate, F.pad, torch._C._nn.pad, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
@_rule(torch.clone, Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.float, Tensor.double, Tensor.detach)
def _keeps(result, x, *args, **kwargs):
    """Commutes with a scale above 0 of each channel."""
    return x.tag


@_rule(torch.mean, Tensor.mean, torch.sum, Tensor.sum, torch.amax, Tensor.amax)
def _reduces_pixels(result, x, dim=None, *args, **kwargs):
    dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    if {d % x.ndim for d in dims} & {0, 1}:
        raise _Refusal("a reduction over images or channels is not known to keep the scale of spikes")
    return x.tag


@_rule(torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view, Tensor.squeeze, torch.squeeze)
def _reshapes(result, x, *args, **kwargs):
    if result.shape[:2] == x.shape[:2]:
        return x.tag
    if result.shape != (x.shape[0], x.shape[1:].numel()):
        raise _Refusal(
            f"a change of shape from {tuple(x.shape)} to {tuple(result.shape)} is not known to keep the scale of spikes"
        )
    x.tag.read_by("a flatten")
    return _Tag(x.tag.units.repeat_interleave(x.shape[2:].numel()))


@_rule(torch.cat, torch.concat)
def _cat(result, tensors, dim=0):
    if dim % result.ndim != 1:
        raise _Refusal("a concatenation of other than channels is not known to keep the scale of spikes")
    parts = []
    for tensor in tensors:
        if isinstance(tensor, _Traced):
            tensor.tag.read_by("a concatenation")
        parts.append(
            tensor.tag.units if isinstance(tensor, _Traced) else torch.zeros(tensor.shape[1], dtype=torch.long)
        )
    return _Tag(torch.cat(parts))


@_rule(torch.chunk, Tensor.chunk, torch.split, Tensor.split)
def _split(result, x, size, dim=0):
    if dim % x.ndim != 1:
        raise _Refusal("a split of other than channels is not known to keep the scale of spikes")
    x.tag.read_by("a split")
    return [_Tag(part) for part in x.tag.units.split([r.shape[1] for r in result])]


@_rule(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def _add(result, x, other):
    if not isinstance(x, _Traced):
        x, other = other, x
    if not isinstance(other, _Traced):
        return x.tag if isinstance(other, (int, float)) and other == 0 else _add_tags(x.tag, _constant(x.tag))
    return _add_tags(x.tag, other.tag)


def _constant(tag: _Tag) -> _Tag:
    return _Tag(torch.zeros_like(tag.units))


def _add_tags(a: _Tag, b: _Tag) -> _Tag:
    if torch.equal(a.units, b.units):
        return _Tag(a.units, tuple(dict.fromkeys(a.layers + b.layers)), a.fixed or b.fixed)
    spikes, currents = (a, b) if b.free else (b, a)
    if not currents.free:
        raise _Refusal("a sum of spikes of different values, or with real numbers of a given scale")
    currents.read_by("a sum with spikes")
    for layer in currents.layers:
        layer.output_units = spikes.units
    return _Tag(spikes.units, tuple(dict.fromkeys(spikes.layers + currents.layers)))


@_rule(torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__)
def _mul(result, x, other):
    """A product with a gate or a constant in real numbers keeps the scale of the other factor."""
    if not isinstance(x, _Traced) or (isinstance(other, _Traced) and x.tag.real and not other.tag.real):
        x, other = other, x
    if isinstance(other, _Traced):
        if x.tag.free < other.tag.free and x.tag.real:
            x, other = other, x
        if not other.tag.real:
            raise _Refusal("a product of two spike trains")
        other.tag.read_by("a product")
    for layer in x.tag.layers:
        layer.can_shift = False
    return x.tag
