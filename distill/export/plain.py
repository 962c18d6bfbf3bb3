"""A spiking network as one time step on plain tensors, of torch's own layers and neurons, batch norms folded.

What every format but `snn` is made of. The graph's modules are torch.nn's convolutions and linear layers and those of
`distill.export.leaves`; pooling, padding, sums and shapes are functions. All weights are copies.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, fx, nn

from distill.export.folding import fold
from distill.export.leaves import Gate, Neuron
from distill.export.loops import head_starts, record_loop
from distill.export.recording import BATCH, Noted, Recorder
from models import FeedbackLoop, SpikingNetwork, SpikingNeuron, UnsupportedOperationError
from models.dsr import DSRNeuron
from models.traversal import path_in_traceback
from models.twin import OnRate


def plain_network(network: SpikingNetwork, size: tuple[int, ...]) -> fx.GraphModule:
    """One time step of a network, in evaluation mode: (B, C, H, W) to (B, classes).

    Modules of the graph hold no state: a `Neuron` is given its membrane and gives it back, a `Gate` is given a rate; a
    feedback loop is given the spikes of the step before (`distill.export.loops`).
    Each node's ``meta["shape"]`` is the shape of what it gives, without the batch.

    Args:
        network: of float32 or float64 weights; left as it is.
        size: (C, H, W) of its images: paddings and sizes in the graph are for these.

    Raises:
        UnsupportedOperationError: names the operation and the module that has no plain form.
    """
    own = copy.deepcopy(network).eval()
    own.step_mode, own.input_encoder = "s", None
    parameter = next(own.parameters())
    nothing = torch.zeros(BATCH, *size, dtype=parameter.dtype)
    fed_back, starts = _shapes_of_loops(own, nothing), head_starts(own)
    recorder = Recorder()
    for name, module in own.named_modules():
        if name in fed_back:
            record_loop(recorder, name, module, fed_back[name])  # type: ignore[arg-type]
        else:
            _intercept(recorder, name, module, starts)
    recorder.watch(own)
    image = recorder.input("x", nothing)
    try:
        with torch.no_grad():
            logits = own(image)
    except UnsupportedOperationError as error:
        place = path_in_traceback(own, error)
        raise UnsupportedOperationError(f"{type(network).__name__} has no plain form: {error}, in {place}") from error
    graph = recorder.finish(logits)
    fold(graph, parameter.dtype)
    return graph.eval().requires_grad_(False)


def _shapes_of_loops(network: SpikingNetwork, image: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of what each feedback loop gives, without the batch, by its name; from one step of the network."""
    found: dict[str, tuple[int, ...]] = {}
    loops = [(name, module) for name, module in network.named_modules() if isinstance(module, FeedbackLoop)]
    if not loops:
        return found

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.__setitem__(name, tuple(output.shape[1:]))

    handles = [module.register_forward_hook(note(name)) for name, module in loops]
    with torch.no_grad():
        network(image)
    functional.reset_net(network)
    for handle in handles:
        handle.remove()
    return found


def _intercept(recorder: Recorder, name: str, module: nn.Module, starts: dict[int, float]) -> None:
    """What is no torch function but one of ours becomes a module of the graph, a new one for each call."""
    if isinstance(module, SpikingNeuron):
        module.forward = functools.partial(_neuron, recorder, module, starts)  # type: ignore[method-assign]
    elif isinstance(module, OnRate):
        module.forward = functools.partial(_gate, recorder, module)  # type: ignore[method-assign]
    elif isinstance(module, DSRNeuron):
        raise UnsupportedOperationError(
            f"the neurons of DSR ({name!r}) look at all time steps at once and fire multiples of a threshold: no "
            "format but snn holds them"
        )


def _neuron(recorder: Recorder, module: SpikingNeuron, starts: dict[int, float], x: Noted) -> Noted:
    leak = module.leak
    value = float(leak.detach()) if isinstance(leak, Tensor) else leak
    return recorder.module(Neuron(module.config, value, starts.get(id(module), 0.0)), x, torch.zeros_like(_value(x)))


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
            f"{format} runs a network step by step, and the analogue gates of this one are computed on the firing rate "
            f"of all steps, which the first step cannot know: {len(gates)} activations, the first {gates[0]!r}. "
            "torch_export, onnx and snn hold such networks"
        )
