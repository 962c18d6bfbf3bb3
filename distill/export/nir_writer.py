"""From the graph of one time step to NIR's.

A sum is several edges into one node. NIR has no concatenation, slice or maximum: a concatenation of channels is the sum
of 1x1 convolutions that put each part in its place, a slice is one that picks channels, and the maximum of spikes is
[their sum > 1/2]. Convolutions are square and without groups (zeros where there were none), which is what nir's own
check of shapes understands.
"""

from __future__ import annotations

from typing import Any

import nir
import numpy as np
import torch
from torch import Tensor, fx, nn

from distill.export.folding import zero_padding
from distill.export.leaves import Neuron
from distill.export.nir_layers import select_channels, square_kernel

DT = 1e-4
"""Length of a time step, seconds."""


class Writer:
    """From the graph of one time step to NIR's.

    The value of a node of the step is the sum of what some NIR nodes give: their names are in `sources`.
    """

    def __init__(self, step: fx.GraphModule, dtype: torch.dtype) -> None:
        self.step = step
        self.dtype = dtype
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.sources: dict[fx.Node, list[str]] = {}
        self.spikes: set[fx.Node] = set()
        """Nodes that give 0 or 1."""
        self.picked: dict[fx.Node, list[Tensor]] = {}
        """Of a split: the channels of each part."""

    def graph(self) -> Any:
        for node in self.step.graph.nodes:
            if node.op == "placeholder":
                self.nodes["input"] = nir.Input(input_type={"input": np.array(node.meta["shape"])})
                self.sources[node] = ["input"]
            elif node.op == "output":
                (last,) = node.all_input_nodes
                self._add("output", nir.Output(output_type={"output": np.array(last.meta["shape"])}), last)
            elif node.op == "call_module":
                self._module(node, getattr(self.step, node.target))
            elif node.op != "get_attr":
                self._function(node)
        return nir.NIRGraph(self.nodes, self.edges)

    def _add(self, name: str, made: Any, source: fx.Node, node: fx.Node | None = None) -> None:
        """A NIR node behind a source, whose value is that of `node`."""
        self.nodes[name] = made
        self.edges += [(other, name) for other in self._distinct(source)]
        if node is not None:
            self.sources[node] = [name]

    def _distinct(self, source: fx.Node) -> list[str]:
        """An edge counts once: what is added twice is doubled first."""
        names = self.sources[source]
        distinct = []
        for name in dict.fromkeys(names):
            count = names.count(name)
            if count > 1:
                scaled = f"{name}_times_{count}"
                if scaled not in self.nodes:
                    shape = source.meta["shape"]
                    self.nodes[scaled] = nir.Scale(np.full(shape, count, self._numpy(torch.ones(1)).dtype))
                    self.edges.append((name, scaled))
                name = scaled
            distinct.append(name)
        return distinct

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        (source,) = node.all_input_nodes
        shape = source.meta["shape"]
        if isinstance(module, Neuron):
            self._add(node.name, self._neuron(module, node.meta["shape"]), source, node)
            self.spikes.add(node)
        elif isinstance(module, nn.Linear) and len(shape) == 1:
            self._affine(node, source, module.weight, module.bias)
        elif isinstance(module, nn.Conv2d):
            self._convolution(node, source, module)
        else:
            raise self._refusal(node, f"{type(module).__name__} of {shape}")

    def _convolution(self, node: fx.Node, source: Any, conv: nn.Conv2d) -> None:
        assert not isinstance(conv.padding, str)
        top, left = conv.padding
        around = (left, left, top, top)
        if (zeros := zero_padding(source)) is not None:  # more on one side than on the other, as "same" has them
            around = (left + zeros[0], left + zeros[1], top + zeros[2], top + zeros[3])
            source = source.args[0]
        try:
            weight, padding = square_kernel(conv, around)
        except ValueError as error:
            raise self._refusal(node, str(error)) from None
        made = nir.Conv2d(
            input_shape=tuple(source.meta["shape"][1:]),
            weight=self._numpy(weight),
            stride=conv.stride,
            padding=padding,
            dilation=conv.dilation,
            groups=1,
            bias=self._numpy(torch.zeros(len(weight)) if conv.bias is None else conv.bias),
        )
        self._add(node.name, made, source, node)

    def _neuron(self, neuron: Neuron, shape: tuple[int, ...]) -> Any:
        threshold = torch.tensor(neuron.config.threshold, dtype=self.dtype)
        below = torch.nextafter(threshold, torch.zeros_like(threshold)).item()
        zero, v_threshold = self._full(shape, 0.0), self._full(shape, below)
        if neuron.leak == 1:
            return nir.IF(r=self._full(shape, 1 / DT), v_threshold=v_threshold, v_reset=zero)
        tau, r = self._full(shape, DT * neuron.tau), self._full(shape, neuron.tau)
        return nir.LIF(tau=tau, r=r, v_leak=zero, v_threshold=v_threshold, v_reset=zero.copy())

    def _affine(self, node: fx.Node, source: fx.Node, weight: Tensor, bias: Tensor | None) -> None:
        weight_ = self._numpy(weight)
        made = nir.Linear(weight_) if bias is None else nir.Affine(weight_, self._numpy(bias))
        self._add(node.name, made, source, node)

    def _function(self, node: fx.Node) -> None:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        rule = getattr(self, f"_on_{name}", None)
        if rule is None:
            raise self._refusal(node, name)
        rule(node, *node.args, **node.kwargs)

    def _refusal(self, node: fx.Node, what: str) -> ValueError:
        return ValueError(
            f"NIR has no node for {what} ({node.name!r} of this network); onnx, torch_export and spikingjelly do"
        )

    # -- sums and products ------------------------------------------------------------------------

    def _on_add(self, node, x, other, alpha=1):
        self._sum(node, x, 1.0, other, float(alpha))

    def _on_sub(self, node, x, other, alpha=1):
        self._sum(node, x, 1.0, other, -float(alpha))

    def _sum(self, node: fx.Node, x: Any, a: float, y: Any, b: float) -> None:
        """a x + b y of two signals, or of one and a constant."""
        if not self._is_signal(x):
            x, a, y, b = y, b, x, a
        if not self._is_signal(y):
            shift = b * self._constant(y, node)
            self._per_channel(node, x, torch.full_like(shift, a), shift)
            return
        if tuple(x.meta["shape"]) != tuple(y.meta["shape"]):
            raise self._refusal(node, f"a sum of shapes {tuple(x.meta['shape'])} and {tuple(y.meta['shape'])}")
        self.sources[node] = []
        for name, signal, factor in (("left", x, a), ("right", y, b)):
            if factor == 1:
                self.sources[node] += self.sources[signal]
            else:
                self.sources[node].append(self._scaled(f"{node.name}_{name}", signal, torch.tensor(factor)))

    def _on_mul(self, node, x, other):
        if not self._is_signal(x):
            x, other = other, x
        if self._is_signal(other):
            raise self._refusal(node, "the product of two signals")
        self.sources[node] = [self._scaled(node.name, x, self._constant(other, node))]

    def _on_truediv(self, node, x, other):
        if self._is_signal(other) or not self._is_signal(x):
            raise self._refusal(node, "a division by a signal")
        self.sources[node] = [self._scaled(node.name, x, 1 / self._constant(other, node))]

    def _on_neg(self, node, x):
        self.sources[node] = [self._scaled(node.name, x, torch.tensor(-1.0))]

    _on_div = _on_truediv

    def _is_signal(self, x: Any) -> bool:
        return isinstance(x, fx.Node) and x.op != "get_attr"

    def _constant(self, x: Any, node: fx.Node) -> Tensor:
        """A number or a tensor of the step, without a batch axis."""
        value: Any = getattr(self.step, str(x.target)) if isinstance(x, fx.Node) else torch.tensor(float(x))
        if value.ndim == len(node.meta["shape"]) + 1:
            value = value.squeeze(0)
        return value.to(self.dtype)

    def _scaled(self, name: str, x: fx.Node, factor: Tensor) -> str:
        scale = factor.to(self.dtype).expand(x.meta["shape"])
        self._add(name, nir.Scale(self._numpy(scale)), x)
        return name

    def _per_channel(self, node: fx.Node, x: fx.Node, scale: Tensor, shift: Tensor) -> None:
        """x * scale + shift, of constants that are the same at each pixel."""
        shape = x.meta["shape"]
        values = [value.expand(shape).reshape(shape[0], -1) for value in (scale, shift)]
        if any((value != value[:, :1]).any() for value in values):
            raise self._refusal(node, "a constant that differs from pixel to pixel")
        weight, bias = torch.diag(values[0][:, 0]), values[1][:, 0]
        self._channels(node, x, weight, bias)

    def _channels(self, node: fx.Node, x: fx.Node, weight: Tensor, bias: Tensor | None = None) -> None:
        """A matrix on the channels of each pixel, or on a vector."""
        self.sources[node] = [self._matrix(node.name, node, x, weight, bias)]

    def _matrix(self, name: str, node: fx.Node, x: fx.Node, weight: Tensor, bias: Tensor | None = None) -> str:
        shape, bias = x.meta["shape"], torch.zeros(len(weight)) if bias is None else bias
        made: Any
        if len(shape) == 1:
            made = nir.Affine(self._numpy(weight), self._numpy(bias))
        elif len(shape) == 3:
            settings = dict(stride=1, padding=0, dilation=1, groups=1, bias=self._numpy(bias))
            made = nir.Conv2d(input_shape=tuple(shape[1:]), weight=self._numpy(weight[:, :, None, None]), **settings)
        else:
            raise self._refusal(node, f"a map of the channels of {shape}")
        self._add(name, made, x)
        return name

    # -- pooling ----------------------------------------------------------------------------------

    def _on_avg_pool2d(
        self,
        node,
        x,
        kernel_size,
        stride=None,
        padding=0,
        ceil_mode=False,
        count_include_pad=True,
        divisor_override=None,
    ):
        kernel, padding = _pair(kernel_size), _pair(padding)
        if divisor_override is not None or (any(padding) and not count_include_pad):
            raise self._refusal(node, "average pooling that divides by another number than the kernel's")
        self._pool(node, x, "AvgPool2d", node.name, kernel, _pair(stride or kernel), padding)
        self.sources[node] = [node.name]

    def _on_adaptive_avg_pool2d(self, node, x, output_size):
        size = x.meta["shape"][1:]
        wanted = [given if given is not None else own for given, own in zip(_pair(output_size), size, strict=True)]
        if any(own % given for own, given in zip(size, wanted, strict=True)):
            raise self._refusal(node, f"adaptive pooling from {tuple(size)} to {tuple(wanted)}")
        kernel = tuple(own // given for own, given in zip(size, wanted, strict=True))
        self._pool(node, x, "AvgPool2d", node.name, kernel, kernel, (0, 0))
        self.sources[node] = [node.name]

    def _on_mean(self, node, x, dim, keepdim=False, dtype=None):
        axes = sorted(axis % (len(x.meta["shape"]) + 1) for axis in ([dim] if isinstance(dim, int) else dim))
        if len(x.meta["shape"]) != 3 or axes != [2, 3]:
            raise self._refusal(node, f"a mean over the axes {dim}")
        size = tuple(x.meta["shape"][1:])
        self._pool(node, x, "AvgPool2d", node.name, size, size, (0, 0), shape=(x.meta["shape"][0], 1, 1))
        self.sources[node] = [node.name]
        if not keepdim:
            self._flat(node, (x.meta["shape"][0], 1, 1))

    def _on_max_pool2d(
        self, node, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
    ):
        if x not in self.spikes:
            raise self._refusal(node, "max pooling of anything but spikes")
        if _pair(dilation) != (1, 1):
            raise self._refusal(node, "max pooling with dilation")
        kernel, total = _pair(kernel_size), f"{node.name}_sum"
        self._pool(node, x, "SumPool2d", total, kernel, _pair(stride or kernel), _pair(padding))
        self.nodes[node.name] = nir.Threshold(threshold=self._full(node.meta["shape"], 0.5))
        self.edges.append((total, node.name))
        self.sources[node] = [node.name]
        self.spikes.add(node)

    def _pool(self, node, x, kind, name, kernel, stride, padding, shape=None) -> None:
        size, wanted = x.meta["shape"][1:], (shape or node.meta["shape"])[1:]
        given = [(own + 2 * p - k) // s + 1 for own, k, s, p in zip(size, kernel, stride, padding, strict=True)]
        if given != list(wanted):
            raise self._refusal(node, f"pooling from {tuple(size)} to {tuple(wanted)} with kernel {kernel} (ceil_mode)")
        settings = dict(kernel_size=kernel, stride=stride, padding=padding)
        self._add(name, getattr(nir, kind)(**{k: np.array(v) for k, v in settings.items()}), x)

    # -- shapes -----------------------------------------------------------------------------------

    def _on_flatten(self, node, x, start_dim=0, end_dim=-1):
        self._reshaped(node, x)

    def _on_reshape(self, node, x, *shape):
        self._reshaped(node, x)

    def _on_squeeze(self, node, x, dim):
        self._reshaped(node, x)

    def _reshaped(self, node: fx.Node, x: fx.Node) -> None:
        before, after = tuple(x.meta["shape"]), tuple(node.meta["shape"])
        self.sources[node] = self.sources[x]
        if before != after and len(after) != 1:
            raise self._refusal(node, f"a reshape from {before} to {after}")
        if before != after:
            self._flat(node, before)

    def _flat(self, node: fx.Node, before: tuple[int, ...]) -> None:
        name = f"{node.name}_flat"
        self.nodes[name] = nir.Flatten(input_type={"input": np.array(before)}, start_dim=0, end_dim=-1)
        self.edges += [(source, name) for source in self._distinct(node)]
        self.sources[node] = [name]

    def _on_pad(self, node, x, pad, mode="constant", value=None):
        """Goes into the convolutions behind it."""
        behind = [getattr(self.step, user.target) if user.op == "call_module" else None for user in node.users]
        if zero_padding(node) is None or not all(isinstance(module, nn.Conv2d) for module in behind):
            raise self._refusal(node, f"padding {tuple(pad)} ({mode})")

    def _on_cat(self, node, tensors, dim=0):
        channels = [x.meta["shape"][0] for x in tensors]
        if dim % (len(node.meta["shape"]) + 1) != 1:
            raise self._refusal(node, f"a concatenation of axis {dim}")
        ends, total = np.cumsum(channels).tolist(), sum(channels)
        names = []
        for i, (x, count, end) in enumerate(zip(tensors, channels, ends, strict=True)):
            place = torch.zeros(total, count)
            place[end - count : end] = torch.eye(count)
            names.append(self._matrix(f"{node.name}_{i}", node, x, place))
        self.sources[node] = names
        if all(x in self.spikes for x in tensors):
            self.spikes.add(node)

    def _on_split(self, node, x, *args, **kwargs):
        self.picked[node] = list(select_channels(node, x.meta["shape"][0]))
        self.sources[node] = self.sources[x]

    _on_chunk = _on_split

    def _on_getitem(self, node, x, index):
        if x in self.picked:
            rows = self.picked[x][index]
            source = x.args[0]
        elif isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and isinstance(index[1], slice):
            source = x
            rows = torch.arange(x.meta["shape"][0])[index[1]]
        else:
            raise self._refusal(node, f"the part {index} of a signal")
        self._channels(node, source, torch.eye(source.meta["shape"][0])[rows])
        if source in self.spikes:
            self.spikes.add(node)

    # -- numbers ----------------------------------------------------------------------------------

    def _full(self, shape: tuple[int, ...], value: float) -> np.ndarray:
        return self._numpy(torch.full(tuple(shape), value, dtype=self.dtype))

    def _numpy(self, x: Tensor) -> np.ndarray:
        return x.detach().to(self.dtype).contiguous().numpy().copy()


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)):
        return (value[0], value[-1])
    return (value, value)
