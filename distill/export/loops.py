"""How a feedback loop is written down: the spikes of the step before are one more input of the step's graph.

That input is a placeholder behind the first; its ``meta[FED_BY]`` is the name of the node that gives it for the next
step, and at the first step it is all zeros, of which the feedback, linear and without a bias, makes no current. Where a
membrane has a head start, neurons start from there: for integrate-and-fire neurons that is all that it does.
"""

from __future__ import annotations

import functools

from torch import Tensor, fx, nn

from distill.export.recording import BATCH, Noted, Recorder
from models import FeedbackLoop, SpikingNeuron, UnsupportedOperationError

FED_BY = "fed_by"


def record_loop(recorder: Recorder, name: str, loop: FeedbackLoop, shape: tuple[int, ...]) -> None:
    """Has a loop written down when it is called.

    Args:
        loop: its neurons note themselves.
        shape: of its last layer's spikes, without the batch.

    Raises:
        UnsupportedOperationError: for neurons that leak, whose readout weighs the steps.
    """
    if loop.leak != 1:
        raise UnsupportedOperationError(
            f"the readout of the feedback loop {name!r} weighs the spikes of each step by the leak of its neurons "
            f"({loop.leak}), which no format but snn holds; integrate-and-fire loops (leak 1) can be written"
        )
    loop.forward = functools.partial(_step, recorder, name, loop, shape)  # type: ignore[method-assign]


def _step(recorder: Recorder, name: str, loop: FeedbackLoop, shape: tuple[int, ...], x: Noted) -> Noted:
    current = loop.input_map(x)
    before = recorder.state(f"{name}.spikes", current.as_subclass(Tensor).new_zeros(BATCH, *shape))
    spikes = loop.neurons[0](current + loop.feedback(before))
    for layer, neuron in zip(loop.maps, loop.neurons[1:], strict=True):
        spikes = neuron(layer(spikes))
    before.node.meta[FED_BY] = spikes.node.name
    return spikes


def head_starts(network: nn.Module) -> dict[int, float]:
    """The membranes of the neurons of loops before the first step, by the neuron's id."""
    loops = [module for module in network.modules() if isinstance(module, FeedbackLoop)]
    return {
        id(neuron): loop.config.head_start * loop.threshold  # type: ignore[operator]
        for loop in loops
        for neuron in loop.neurons
        if isinstance(neuron, SpikingNeuron)
    }


def states_of(graph: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """The inputs that stand for the step before, with the nodes that give them for the next."""
    nodes = {node.name: node for node in graph.graph.nodes}
    return {node: nodes[node.meta[FED_BY]] for node in nodes.values() if FED_BY in node.meta}


def nodes_of_loop(graph: fx.GraphModule, before: fx.Node, fed: fx.Node) -> list[fx.Node]:
    """What lies on a way from the step before to the next, in order, without `before`."""
    nodes = list(graph.graph.nodes)
    behind, leading = {before}, {fed}
    for node in nodes:
        if any(source in behind for source in node.all_input_nodes):
            behind.add(node)
    for node in reversed(nodes):
        if node in leading:
            leading.update(node.all_input_nodes)
    return [node for node in nodes if node in behind & leading and node is not before]


def refuse_loops(graph: fx.GraphModule, format: str) -> None:
    """
    Raises:
        ValueError: if the graph has a loop.
    """
    if states := states_of(graph):
        raise ValueError(
            f"{format} holds no feedback loop: a step of this network takes spikes of the step before "
            f"({next(iter(states)).target!r}). torch_export, onnx, spikingjelly and snn hold such networks"
        )
