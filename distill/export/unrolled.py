"""All T steps of a plain network as one torch module, which torch's exporters take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from distill.export.leaves import Gate, Neuron
from distill.export.loops import nodes_of_loop, states_of
from models.layout import at_least_float32


class Unrolled(nn.Module):
    """All T steps of a plain network in one graph: images (B, C, H, W), or frames (T, B, C, H, W), to mean logits.

    Layers run on time folded into the batch, (T*B, C, ...), and what does not change over time runs once: only the
    neurons are a loop over the steps, and of a network with feedback all that lies on the way around.
    """

    def __init__(self, step: fx.GraphModule, timesteps: int) -> None:
        super().__init__()
        self.step = step
        self.timesteps = timesteps
        self._loops = {before: (fed, nodes_of_loop(step, before, fed)) for before, fed in states_of(step).items()}

    def forward(self, images: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {}
        changing: set[fx.Node] = set()
        for node in self.step.graph.nodes:
            if node in values:  # of a loop that has run
                continue
            if node in self._loops:
                self._run_loop(node, values, changing)
            elif node.op == "placeholder":
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
        return self._call(node, values)

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])  # type: ignore[misc]
        if node.op == "call_module":
            return getattr(self.step, node.target)(*args, **kwargs)  # type: ignore[arg-type]
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _run_loop(self, before: fx.Node, values: dict[fx.Node, Any], changing: set[fx.Node]) -> None:
        """All steps of a feedback loop, one after the other: what comes from outside of it is known by now."""
        fed, nodes = self._loops[before]
        outside = {source for node in nodes for source in node.all_input_nodes} - {*nodes, before}
        for source in outside:
            if source.op == "get_attr":
                values[source] = getattr(self.step, source.target)  # type: ignore[arg-type]
        each = {source: self._unfolded(values[source]) for source in outside if source in changing}
        like = next(source for source in outside if source.op != "get_attr")
        images = values[like].shape[0] // (self.timesteps if like in each else 1)
        spikes = values[like].new_zeros(images, *before.meta["shape"])
        membranes: dict[fx.Node, Tensor | None] = dict.fromkeys(nodes)
        needed = {node: [] for node in nodes if any(user not in nodes for user in node.users)}  # type: ignore[var-annotated]
        for t in range(self.timesteps):
            now = {source: each[source][t] if source in each else values[source] for source in outside}
            now[before] = spikes
            for node in nodes:
                module = getattr(self.step, node.target) if node.op == "call_module" else None  # type: ignore[arg-type]
                if isinstance(module, Neuron):
                    (source,) = node.all_input_nodes
                    fired, membranes[node] = module(at_least_float32(now[source]), membranes[node])
                    now[node] = fired.to(now[source].dtype)
                else:
                    now[node] = self._call(node, now)
            spikes = now[fed]
            for node, steps in needed.items():
                steps.append(now[node])
        for node in nodes:
            values[node] = torch.cat(needed[node]) if node in needed else None
        changing.update(nodes)

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
