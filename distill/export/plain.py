"""A spiking network as one time step on plain tensors, of torch's own layers and neurons, batch norms folded.

What every format but `snn` is made of. The graph's modules are torch.nn's convolutions and linear layers and those of
`distill.export.leaves`; pooling, padding, sums and shapes are functions. All weights are copies.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, fx, nn

from distill.export.folding import fold
from distill.export.leaves import Gate, Neuron
from distill.export.recording import BATCH, Noted, Recorder
from models import SpikingNetwork, SpikingNeuron, UnsupportedOperationError
from models.dsr import DSRNeuron
from models.kernels import at_least_float32
from models.traversal import path_in_traceback
from models.twin import OnRate


def plain_network(network: SpikingNetwork, size: tuple[int, ...]) -> fx.GraphModule:
    """One time step of a network, in evaluation mode: (B, C, H, W) to (B, classes).

    Modules of the graph hold no state: a `Neuron` is given its membrane and gives it back, a `Gate` is given a rate.
    Each node's ``meta["shape"]`` is the shape of what it gives, without the batch.

    Args:
        network: of float32 or float64 weights; left as it is.
        size: (C, H, W) of its images: paddings and sizes in the graph are for these.

    Raises:
        UnsupportedOperationError: names the operation and the module that has no plain form.
    """
    own = copy.deepcopy(network).eval()
    own.step_mode, own.input_encoder = "s", None
    recorder = Recorder()
    for name, module in own.named_modules():
        _intercept(recorder, name, module)
    recorder.watch(own)
    parameter = next(own.parameters())
    image = recorder.input("x", torch.zeros(BATCH, *size, dtype=parameter.dtype))
    try:
        with torch.no_grad():
            logits = own(image)
    except UnsupportedOperationError as error:
        place = path_in_traceback(own, error)
        raise UnsupportedOperationError(f"{type(network).__name__} has no plain form: {error}, in {place}") from error
    graph = recorder.finish(logits)
    fold(graph, parameter.dtype)
    return graph.eval().requires_grad_(False)


def _intercept(recorder: Recorder, name: str, module: nn.Module) -> None:
    """What is no torch function but one of ours becomes a module of the graph, a new one for each call."""
    if isinstance(module, SpikingNeuron):
        module.forward = functools.partial(_neuron, recorder, module)  # type: ignore[method-assign]
    elif isinstance(module, OnRate):
        module.forward = functools.partial(_gate, recorder, module)  # type: ignore[method-assign]
    elif isinstance(module, DSRNeuron):
        raise UnsupportedOperationError(
            f"the neurons of DSR ({name!r}) look at all time steps at once and fire multiples of a threshold: no format "
            "but snn holds them"
        )


def _neuron(recorder: Recorder, module: SpikingNeuron, x: Noted) -> Noted:
    leak = module.leak
    plain = Neuron(module.config, float(leak.detach()) if isinstance(leak, Tensor) else leak)
    return recorder.module(plain, x, torch.zeros_like(_value(x)))


def _gate(recorder: Recorder, module: OnRate, x: Noted) -> Noted:
    value = _value(x)
    return recorder.module(Gate(copy.deepcopy(module.activation)), x, module.activation(value))


def _value(x: Any) -> Tensor:
    return x.as_subclass(Tensor)


def neurons_of(graph: fx.GraphModule) -> dict[str, Neuron]:
    """The layers of neurons by the name of their module in the graph."""
    return {name: module for name, module in graph.named_children() if isinstance(module, Neuron)}


def refuse_gates(graph: fx.GraphModule, format: str) -> None:
    """
    Raises:
        ValueError: names the first gate that the graph has.
    """
    gates = [name for name, module in graph.named_children() if isinstance(module, Gate)]
    if gates:
        raise ValueError(
            f"{format} runs a network step by step, and this one has {len(gates)} analogue gates, the first {gates[0]!r}, "
            "which are computed on the firing rate of all steps: the first step cannot know it. torch_export, onnx and "
            "snn hold such networks"
        )


class Unrolled(nn.Module):
    """All T steps of a plain network in one graph: images (B, C, H, W), or frames (T, B, C, H, W), to mean logits.

    Layers run on time folded into the batch, (T*B, C, ...), and what does not change over time runs once: only the
    neurons are a loop over the steps.
    """

    def __init__(self, step: fx.GraphModule, timesteps: int) -> None:
        super().__init__()
        self.step = step
        self.timesteps = timesteps

    def forward(self, images: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {}
        changing: set[fx.Node] = set()
        for node in self.step.graph.nodes:
            if node.op == "placeholder":
                values[node] = images.flatten(0, 1) if images.ndim == 5 else images
                if images.ndim == 5:
                    changing.add(node)
            elif node.op == "output":
                (last,) = node.all_input_nodes
                return self._mean(values[last]) if last in changing else values[last]
            elif node.op == "get_attr":
                values[node] = getattr(self.step, node.target)
            elif node.op == "call_module" and isinstance(module := getattr(self.step, node.target), (Neuron, Gate)):
                (source,) = node.all_input_nodes
                if isinstance(module, Gate):
                    values[node] = module(self._mean(values[source]) if source in changing else values[source])
                else:
                    values[node] = self._spikes(module, values[source], source in changing)
                    changing.add(node)
            else:
                values[node] = self._map(node, values, changing)
        raise AssertionError("a graph ends in its output")

    def _map(self, node: fx.Node, values: dict[fx.Node, Any], changing: set[fx.Node]) -> Any:
        """What works on each step by itself; what is the same at each step is repeated where others are not."""
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if any(source in changing for source in sources):
            changing.add(node)
            repeated = {s: self._repeated(values[s]) for s in sources if s not in changing}
            values = {**values, **repeated}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])  # type: ignore[misc]
        if node.op == "call_module":
            return getattr(self.step, node.target)(*args, **kwargs)  # type: ignore[arg-type]
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _spikes(self, neuron: Neuron, currents: Tensor, changing: bool) -> Tensor:
        dtype, currents = currents.dtype, at_least_float32(currents)
        steps = self._unfolded(currents) if changing else [currents] * self.timesteps
        v, spikes = None, []
        for current in steps:
            s, v = neuron(current, v)
            spikes.append(s)
        return torch.cat(spikes).to(dtype)

    def _unfolded(self, x: Tensor) -> Tensor:
        return x.reshape(self.timesteps, -1, *x.shape[1:])

    def _mean(self, x: Tensor) -> Tensor:
        return self._unfolded(x).mean(0)

    def _repeated(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.timesteps)
