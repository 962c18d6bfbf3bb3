"""Multiply-accumulates of an analogue network: of a teacher, of its blocks behind a tap, of an adapter.

Counted at ATen's five products, to which convolutions, linear layers, attention and `einsum` all come down, and from
shapes alone. SpikingJelly's `MACCounter` gives the same numbers (the tests compare them) but takes a tensor of zeros
and ones for spikes, whose products are free: an analogue layer behind a silent one would cost nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from distill.adapters import Adapter
from distill.energy.calls import RunningModule
from distill.energy.costs import WORD, Cost, LayerCost
from distill.taps import Tap, hooks

aten = torch.ops.aten


class AnalogueCosts(NamedTuple):
    """Per image."""

    whole: Cost
    behind: dict[str, Cost]
    """Of what runs after a module has ended, by its name."""


def analogue_costs(network: nn.Module, image: Tensor, cuts: Sequence[str] = ()) -> AnalogueCosts:
    """Counts on one image, whose numbers do not matter.

    Args:
        network: in evaluation mode.
        image: (1, C, H, W).
        cuts: modules for which the costs behind them are wanted.
    """
    counter = _Counter(network)
    ended: dict[str, int] = {}

    def end(name: str) -> Callable:
        def hook(*_: Any) -> None:
            ended[name] = len(counter.layers)

        return hook

    with hooks([(network.get_submodule(name), end(name)) for name in cuts]):
        counter.run(lambda: network(image))
    layers = tuple(counter.layers)
    return AnalogueCosts(Cost(layers), {name: Cost(layers[ran:]) for name, ran in ended.items()})


def adapter_cost(adapter: Adapter, tap: Tap) -> Cost:
    """Of one image: of its convolution, where it has one.

    Args:
        adapter: in evaluation mode.
        tap: gives the size of the teacher's feature, to which rates are resized first.
    """
    size = tap.shape[1:]
    counter = _Counter(adapter)
    counter.run(lambda: adapter(adapter.bn.weight.new_zeros(1, adapter.in_channels, *size), size))
    return Cost(tuple(counter.layers))


class _Counter(TorchDispatchMode):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._running = RunningModule(network)
        self.layers: list[LayerCost] = []

    def run(self, forward: Callable[[], object]) -> None:
        with torch.no_grad(), _in_products(), self._running.followed(), self:
            forward()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if (count := _PRODUCTS.get(func)) is not None:
            macs, numbers = count(output, *args)
            self.layers.append(LayerCost(self._running.name_of_call(), False, macs, 0.0, WORD * numbers))
        return output


@contextlib.contextmanager
def _in_products() -> Iterator[None]:
    """Attention as products and a softmax, not as a kernel of its own."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _convolution(output, x, weight, bias, stride, padding, dilation, transposed, *_) -> tuple[int, int]:
    """MACs, and how many numbers go to or from memory: weights and biases once, the input twice."""
    places = (x if transposed else output).shape
    biases = 0 if bias is None else bias.numel()
    return weight.numel() * places[0] * math.prod(places[2:]), weight.numel() + biases + 2 * x.numel()


def _mm(output, x, weight) -> tuple[int, int]:
    return x.numel() * weight.shape[1], weight.numel() + 2 * x.numel()


def _addmm(output, bias, x, weight) -> tuple[int, int]:
    macs, numbers = _mm(output, x, weight)
    return macs, numbers + bias.numel()


def _bmm(output, x, y) -> tuple[int, int]:
    """Both are activations."""
    return x.numel() * y.shape[2], 2 * (x.numel() + y.numel())


def _baddbmm(output, _, x, y) -> tuple[int, int]:
    return _bmm(output, x, y)


_PRODUCTS: Mapping[Any, Callable[..., tuple[int, int]]] = {
    aten.convolution.default: _convolution,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten.baddbmm.default: _baddbmm,
}
