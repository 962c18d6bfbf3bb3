"""Operations of a spiking network, counted in the pass that it really makes.

Every convolution and linear layer is met at the torch function that it calls, whatever module calls it, on the spike
train that it is given. Whether the train is spikes is seen from its numbers, over all images: non-negative integers
(spikes and their sums) are, all else is not. Where a part of the network runs a time step at a time, its calls at all
steps make one layer.

SpikingJelly's `SynOpCounter` counts the same synaptic operations of one binary tensor, and the tests compare the two.
It is not used here because it sees plain tensors: it would count an input that is constant over time once, which our
passes compute once, and not T times; it takes sums of spikes (SEW) for analogue; and it gives one number for a batch,
while of several processes each image must count once.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from distill.energy.calls import RunningModule
from distill.energy.costs import WORD, Cost, LayerCost
from distill.energy.fan_out import fan_out, padding_before, per_axis
from distill.precision import widest_float
from distill.preparation import channels_last
from distill.processes import Agreement
from distill.random_numbers import repeatable
from distill.taps import hooks
from models import DSRNeuron, SpikeTrain, SpikingNetwork, SpikingNeuron
from models.compiling import uncompiled


class SpikingCosts(NamedTuple):
    """Per image, a mean over the images."""

    whole: Cost
    """Of everything that ran."""
    up_to: dict[str, Cost]
    """Of what ran until a module ended, by its name."""
    images: int


@torch.no_grad()
def spiking_costs(
    accelerator: Accelerator,
    loader: DataLoader,
    network: SpikingNetwork,
    until: str | None = None,
    cuts: Sequence[str] = (),
) -> SpikingCosts:
    """Counts on all images of a loader.

    Args:
        loader: prepared, of (images, labels).
        network: in evaluation mode.
        until: a module's name: nothing behind it runs.
        cuts: modules for which the costs up to their end are wanted, too.
    """
    counter, agreement = _Counter(network, cuts), Agreement(accelerator)

    def count(images: Tensor) -> Tensor:
        with accelerator.autocast(), counter.counting():
            network(channels_last(images)) if until is None else network(channels_last(images), until=until)
        return counter.per_image()

    total, images_seen = None, 0
    # compiled kernels would be compiled anew for a pass that is watched
    with repeatable(accelerator.device), uncompiled():
        for images, _ in loader:
            # where one process fails, no other may wait for its numbers
            of_batch = agreement.together(functools.partial(count, images))
            found = accelerator.gather_for_metrics(of_batch).cpu()
            images_seen += len(found)
            sums = _Sums(found[..., 0].sum(0), found[..., 1].amin(0), found[..., 2].amax(0))
            total = sums if total is None else total.with_more(sums)
    assert total is not None, "a loader of no images"
    layers = [
        call.cost(acs / images_seen, bool(integer), largest)
        for call, acs, integer, largest in zip(
            counter.calls.values(), total.synops.tolist(), total.integer.tolist(), total.largest.tolist(), strict=True
        )
    ]
    bits = list(counter.membrane_bits.values())
    up_to = {name: Cost(tuple(layers[:ran]), sum(bits[:fired])) for name, (ran, fired) in counter.ended.items()}
    return SpikingCosts(Cost(tuple(layers), sum(bits)), up_to, images_seen)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a layer in a pass, of all time steps.

    Args:
        macs, weights, inputs: of one image: its multiply-accumulates where nothing is left out, weights and biases that
            are read, numbers of its input.
        synops: if its input is integer, (B,).
        integer: whether it is, (B,), 0 or 1.
        largest: number in it, (B,).
    """

    name: str
    macs: int
    weights: int
    inputs: int
    synops: Tensor
    integer: Tensor
    largest: Tensor

    def cost(self, synops: float, integer: bool, largest: float) -> LayerCost:
        bits = max(1, int(largest).bit_length()) if integer else WORD
        traffic = WORD * self.weights + 2 * bits * self.inputs
        return LayerCost(self.name, integer, 0 if integer else self.macs, synops if integer else 0.0, traffic)

    def with_more(self, other: _Call) -> _Call:
        """With another time step."""
        return _Call(
            self.name,
            self.macs + other.macs,
            self.weights + other.weights,
            self.inputs + other.inputs,
            self.synops + other.synops,
            torch.minimum(self.integer, other.integer),
            torch.maximum(self.largest, other.largest),
        )


@dataclass(frozen=True, slots=True)
class _Sums:
    """Over images, (layers,) each."""

    synops: Tensor
    integer: Tensor
    largest: Tensor

    def with_more(self, other: _Sums) -> _Sums:
        return _Sums(
            self.synops + other.synops, self.integer.min(other.integer), torch.maximum(self.largest, other.largest)
        )


class _Counter(TorchFunctionMode):
    """Notes every layer that is called on a spike train, and every neuron."""

    def __init__(self, network: SpikingNetwork, cuts: Sequence[str]) -> None:
        super().__init__()
        self._network = network
        self._running = RunningModule(network)
        self._cuts = {name: network.get_submodule(name) for name in cuts}
        self._neurons = [m for m in network.modules() if isinstance(m, (SpikingNeuron, DSRNeuron))]
        self._scaled = any(isinstance(m, DSRNeuron) for m in self._neurons)
        self.calls: dict[str, _Call] = {}
        """By the names of the calls."""
        self.membrane_bits: dict[str, int] = {}
        """Of each call of a layer of neurons, all steps."""
        self.ended: dict[str, tuple[int, int]] = {}
        """How many calls of layers and of neurons each cut had behind it when it ended (in the first step, if it runs
        a step at a time)."""
        self._first: dict[str, int] = {}

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts one forward pass, and forgets the one before."""
        self.calls.clear()
        self.membrane_bits.clear()
        self.ended.clear()
        self._first.clear()
        neurons = [(module, self._neuron) for module in self._neurons]
        cuts = [(module, self._end(name)) for name, module in self._cuts.items()]
        with hooks([*neurons, *cuts]), self._running.followed(), self:
            yield

    def per_image(self) -> Tensor:
        """Synaptic operations, whether the input is integer, largest number: (B, layers, 3), in `widest_float`."""
        columns = [torch.stack([call.synops, call.integer, call.largest], dim=1) for call in self.calls.values()]
        return torch.stack(columns, dim=1)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if (note := _LAYERS.get(func)) is not None and isinstance(args[0], SpikeTrain):
            name = self._running.name_of_call(_traversal(args[0]))
            call = note(output, name, *args, **(kwargs or {}))
            call = _rescaled(call, args[0]) if self._scaled else call
            self.calls[name] = call if name not in self.calls else self.calls[name].with_more(call)
        return output

    def _neuron(self, module: nn.Module, args: tuple, output: SpikeTrain) -> None:
        name = self._running.name_of_call(_traversal(output))
        bits = 2 * WORD * output.timesteps * math.prod(output.shape[1:])
        self.membrane_bits[name] = self.membrane_bits.get(name, 0) + bits

    def _end(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: SpikeTrain) -> None:
            traversal = _traversal(output)
            if self._first.setdefault(name, traversal) == traversal:
                self.ended[name] = (len(self.calls), len(self.membrane_bits))

        return hook


def _convolution(output, name, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> _Call:
    kernel = tuple(weight.shape[2:])
    stride, dilation = per_axis(stride, len(kernel)), per_axis(dilation, len(kernel))
    before = padding_before(padding, kernel, dilation)
    reach = fan_out(x.shape[2:], output.shape[2:], kernel, stride, before, dilation)
    by_place = _steps(x).sum((0, 2), dtype=widest_float(x.device))  # (B, ...)
    synops = (by_place * reach.to(by_place)).flatten(1).sum(1) * (weight.shape[0] // groups)
    return _call(name, x, weight, bias, math.prod(output.shape[2:]), synops)


def _transposed_convolution(
    output, name, x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
) -> _Call:
    kernel = tuple(weight.shape[2:])
    stride, padding, dilation = (per_axis(value, len(kernel)) for value in (stride, padding, dilation))
    reach = fan_out(x.shape[2:], output.shape[2:], kernel, stride, padding, dilation, transposed=True)
    by_place = _steps(x).sum((0, 2), dtype=widest_float(x.device))  # (B, ...)
    synops = (by_place * reach.to(by_place)).flatten(1).sum(1) * weight.shape[1]
    return _call(name, x, weight, bias, math.prod(x.shape[2:]), synops)


def _linear(output, name, x, weight, bias=None) -> _Call:
    synops = _steps(x).flatten(2).sum((0, 2), dtype=widest_float(x.device)) * weight.shape[0]
    return _call(name, x, weight, bias, math.prod(output.shape[1:-1]), synops)


_LAYERS: Mapping[Any, Callable[..., _Call]] = {
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.conv_transpose1d: _transposed_convolution,
    F.conv_transpose2d: _transposed_convolution,
    F.conv_transpose3d: _transposed_convolution,
    F.linear: _linear,
}


def _traversal(x: SpikeTrain) -> int:
    """Which step runs, where steps run one at a time; else 0."""
    return 0 if x.tape is None else x.tape.traversals


def _steps(x: SpikeTrain) -> Tensor:
    """The stored steps, (S, B, ...)."""
    return x.folded.unflatten(0, (x.steps, -1))


def _call(name: str, x: SpikeTrain, weight: Tensor, bias: Tensor | None, places: int, synops: Tensor) -> _Call:
    values = _steps(x).flatten(2)
    integer = ((values >= 0) & (values == values.round())).all(2).all(0)
    return _Call(
        name,
        x.timesteps * places * weight.numel(),
        x.timesteps * (weight.numel() + (0 if bias is None else bias.numel())),
        x.timesteps * math.prod(x.shape[1:]),
        synops * (x.timesteps // x.steps),
        integer.to(synops.dtype),
        values.amax((0, 2)).to(synops.dtype),
    )


def _rescaled(call: _Call, x: SpikeTrain) -> _Call:
    """Where spikes are as large as a threshold (DSR), two numbers, 0 and another, are spikes: the other counts 1."""
    values = _steps(x).flatten(2)
    size = values.amax((0, 2))
    binary = ((values == 0) | (values == size[None, :, None])).all(2).all(0) & (size > 0)
    factor = torch.where(binary, 1 / size.to(call.synops.dtype), 1.0)
    integer, largest = torch.where(binary, 1.0, call.integer), torch.where(binary, 1.0, call.largest)
    return replace(call, synops=call.synops * factor, integer=integer, largest=largest)
