"""One time step of a spiking network as a graph of plain torch operations, written down while the network runs.

The network's own code runs once, on a small batch of tensors that note each torch function that is called on them: so
it may look at shapes and choose its way by them, which symbolic tracing cannot follow. What the functions are given is
written down as it is; layers come with their weights (a standardised weight is a number like any other), and only the
batch axis, always the first, stays free.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from distill.export.leaves import ChannelAffine
from models.spiketrain import RULES, UnsupportedOperationError

BATCH = 3
"""Images of the run that is written down."""


class Noted(Tensor):
    """A tensor that notes what is done to it."""

    node: fx.Node
    recorder: Recorder

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        recorder = next(x.recorder for x in _flat((args, kwargs)) if isinstance(x, Noted))
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            result = func(*args, **kwargs)
        if not any(isinstance(x, Tensor) for x in _flat(result)):
            if isinstance(result, (bool, int, float, list)) and getattr(func, "__name__", "") in _LOOKS_AT_NUMBERS:
                raise UnsupportedOperationError(f"{func.__name__} looks at the numbers of one batch")
            return result
        return recorder.note(func, args, kwargs, result)


_LOOKS_AT_NUMBERS = ("__bool__", "__float__", "__int__", "item", "tolist")


class Recorder:
    """The graph that is being written: its nodes call modules, functions and methods of plain tensors.

    Attributes:
        graph: placeholders, one for each input, in order; the output is set by `finish`.
        attributes: modules and tensors of the graph by name.
        path: the names of the network's modules that are running, innermost last.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.attributes: dict[str, nn.Module | Tensor] = {}
        self.path: list[str] = []
        self._constants: dict[int, tuple[str, Tensor]] = {}

    def input(self, name: str, value: Tensor) -> Noted:
        return self.noted(value, self.graph.placeholder(name))

    def state(self, path: str, value: Tensor) -> Noted:
        """One more input, of a step: what the step before has left."""
        return self.noted(value, self.graph.placeholder(self._name(path)))

    def finish(self, output: Any) -> fx.GraphModule:
        self.graph.output(output.node)
        return fx.GraphModule(self.attributes, self.graph)

    def watch(self, network: nn.Module) -> None:
        """Keeps `path` while modules of the network run."""

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.path.pop()

        for name, module in network.named_modules():
            module.register_forward_pre_hook(lambda module, args, name=name: self.path.append(name))
            module.register_forward_hook(leave)

    def noted(self, value: Tensor, node: fx.Node) -> Noted:
        if value.ndim == 0 or value.shape[0] != BATCH:
            raise UnsupportedOperationError(f"{node.target} leaves no batch axis: {tuple(value.shape)}")
        result = value.as_subclass(Noted)
        result.node, result.recorder = node, self
        node.meta["shape"] = tuple(value.shape[1:])
        return result

    def module(self, module: nn.Module, x: Noted, value: Tensor) -> Noted:
        """Notes the call of a module that is given x and gives `value`."""
        name = self._name((self.path or [""])[-1] or type(module).__name__.lower())
        self.attributes[name] = module
        return self.noted(value, self.graph.call_module(name, (x.node,)))

    def note(self, func: Callable, args: tuple, kwargs: dict[str, Any], result: Any) -> Any:
        """Notes a torch function that made `result` of its arguments.

        Raises:
            UnsupportedOperationError: for a function without a place in a spiking network.
        """
        if func not in RULES:
            raise UnsupportedOperationError(f"{getattr(func, '__name__', func)} has no place in a spiking network")
        if func in _LAYERS:
            return self.module(*_LAYERS[func](*args, **kwargs), result)  # type: ignore[call-arg]
        name = func.__name__
        same_type = name in _TYPES and result.dtype == args[0].dtype
        if func in _NOTHING or same_type:
            return self.noted(result, args[0].node)
        if name in ("reshape", "view", "expand", "expand_as"):
            sizes = (-1, *result.shape[1:])
            node = self.graph.call_method("expand" if "expand" in name else "reshape", (args[0].node, *sizes))
            return self.noted(result, node)
        return self._call(func, name, args, kwargs, result)

    def _call(self, func: Callable, name: str, args: tuple, kwargs: dict[str, Any], result: Any) -> Any:
        plain_args, plain_kwargs = fx.node.map_aggregate((args, kwargs), self._plain)  # type: ignore[misc]
        in_place = name in _IN_PLACE
        name = _IN_PLACE.get(name, name)
        if name in _OPERATORS and not plain_kwargs and len(plain_args) <= 2:
            function, backwards = _OPERATORS[name]
            node = self.graph.call_function(function, plain_args[::-1] if backwards else plain_args)
        elif getattr(Tensor, name, None) is func or in_place:
            node = self.graph.call_method(name, plain_args, plain_kwargs)
        else:
            node = self.graph.call_function(func, plain_args, plain_kwargs)
        if in_place:  # changed for all who hold it
            args[0].node = node
            node.meta["shape"] = tuple(result.shape[1:])
            return args[0]
        if isinstance(result, Tensor):
            return self.noted(result, node)
        parts = [self.graph.call_function(operator.getitem, (node, i)) for i in range(len(result))]
        return tuple(self.noted(value, part) for value, part in zip(result, parts, strict=True))

    def _plain(self, x: Any) -> Any:
        if isinstance(x, Noted):
            return x.node
        if not isinstance(x, Tensor):
            return x
        if x.ndim == 0 and not isinstance(x, nn.Parameter):
            return x.item()
        if id(x) not in self._constants:
            name = self._name("_".join(filter(None, ((self.path or [""])[-1], "constant"))))
            # with the tensor itself: of one that is gone another could have the id
            self._constants[id(x)], self.attributes[name] = (name, x), x.detach().clone()
        return self.graph.get_attr(self._constants[id(x)][0])

    def _name(self, path: str) -> str:
        """A name that is free, a Python identifier."""
        base = path.replace(".", "_").strip("_")
        base = base if base.isidentifier() else f"m{base}"
        taken, name, count = {*self.attributes, "forward", "training"}, base, 1
        while name in taken or hasattr(nn.Module, name):
            count += 1
            name = f"{base}_{count}"
        return name


def _convolution(function: Callable, kind: type[nn.Module]) -> None:
    def layer(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        input, padding = _in_numbers(input, weight, padding, dilation)
        out_channels, in_channels = weight.shape[0], weight.shape[1] * groups
        settings = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias is not None)
        made: Any = kind(in_channels, out_channels, tuple(weight.shape[2:]), **settings)
        return _with(made, weight, bias), input

    _LAYERS[function] = layer


def _transposed_convolution(function: Callable, kind: type[nn.Module]) -> None:
    def layer(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        in_channels, out_channels = weight.shape[0], weight.shape[1] * groups
        settings = dict(stride=stride, padding=padding, output_padding=output_padding, groups=groups)
        settings |= dict(bias=bias is not None, dilation=dilation)
        made: Any = kind(in_channels, out_channels, tuple(weight.shape[2:]), **settings)
        return _with(made, weight, bias), input

    _LAYERS[function] = layer


def _in_numbers(input: Tensor, weight: Tensor, padding: Any, dilation: Any) -> tuple[Tensor, Any]:
    """Padding "same" and "valid" in numbers; what is lopsided is padded first, as PyTorch does."""
    if padding == "valid":
        return input, 0
    if padding != "same":
        return input, padding
    axes = weight.ndim - 2
    dilation = [dilation] * axes if isinstance(dilation, int) else dilation
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if all(t % 2 == 0 for t in total):
        return input, tuple(t // 2 for t in total)
    return F.pad(input, [side for t in reversed(total) for side in (t // 2, t - t // 2)]), 0


def _linear(input, weight, bias=None):
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return _with(made, weight, bias), input


def _with(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(layer, name, nn.Parameter(value.detach().clone(), requires_grad=False))
    return layer


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        raise UnsupportedOperationError("a batch norm without running statistics depends on the batch")
    invstd = (running_var.double() + eps).rsqrt()
    scale = invstd if weight is None else invstd * weight.double()
    shift = -running_mean.double() * scale
    return ChannelAffine(scale, shift if bias is None else shift + bias.double()), input


_LAYERS: dict[Any, Callable] = {F.linear: _linear, F.batch_norm: _batch_norm}
_convolution(F.conv1d, nn.Conv1d)
_convolution(F.conv2d, nn.Conv2d)
_convolution(F.conv3d, nn.Conv3d)
_transposed_convolution(F.conv_transpose1d, nn.ConvTranspose1d)
_transposed_convolution(F.conv_transpose2d, nn.ConvTranspose2d)
_transposed_convolution(F.conv_transpose3d, nn.ConvTranspose3d)

_TYPES = ("to", "float", "double", "half", "bfloat16")
_NOTHING = (
    *(Tensor.contiguous, torch.clone, Tensor.clone),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),  # in evaluation mode
)
_BINARY = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv}
_NAMES = {"add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "true_divide": "truediv"}
_OPERATORS: dict[str, tuple[Callable, bool]] = {
    "neg": (operator.neg, False),
    "__neg__": (operator.neg, False),
    **{name: (_BINARY[own], False) for name, own in _NAMES.items()},
    "__getitem__": (operator.getitem, False),
    **{f"__{name}__": (function, False) for name, function in _BINARY.items()},
    **{f"__r{name}__": (function, True) for name, function in _BINARY.items()},
}
_IN_PLACE = {
    **{f"__i{name}__": f"__{name}__" for name in _BINARY},
    **{f"{name}_": name for name in ("add", "sub", "mul", "div")},
}


def _flat(values: Any) -> list[Any]:
    """What is inside nested lists, tuples and dictionaries."""
    if isinstance(values, dict):
        values = list(values.values())
    if not isinstance(values, (list, tuple)):
        return [values]
    return [x for value in values for x in _flat(value)]
