"""A NIR graph run step by step, as the equations of NIR's nodes say: forward Euler, nothing of the rest of the project.

Independent of what writes the graph, so that it can tell whether the graph says what it should.
"""

from __future__ import annotations

from collections import defaultdict
from graphlib import TopologicalSorter
from typing import Any

import nir
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Simulation:
    """Images (B, C, H, W), the same at each step, or frames (T, B, C, H, W), to mean outputs (B, classes).

    Args:
        graph: one `nir.Input` and one `nir.Output`, without cycles.
        timesteps: T.
        dt: length of a step, seconds.
    """

    def __init__(self, graph: Any, timesteps: int, dt: float) -> None:
        self.graph, self.timesteps, self.dt = graph, timesteps, dt
        self.inputs: dict[str, list[str]] = defaultdict(list)
        for source, target in graph.edges:
            self.inputs[target].append(source)
        self.order = list(TopologicalSorter({name: self.inputs[name] for name in graph.nodes}).static_order())
        self.tensors = {name: _tensors(node) for name, node in graph.nodes.items()}

    def __call__(self, images: Tensor) -> Tensor:
        membranes: dict[str, Tensor] = {}
        outputs = [self._step(images[t] if images.ndim == 5 else images, membranes) for t in range(self.timesteps)]
        return torch.stack(outputs).mean(0)

    def _step(self, image: Tensor, membranes: dict[str, Tensor]) -> Tensor:
        values: dict[str, Tensor] = {}
        for name in self.order:
            node = self.graph.nodes[name]
            if isinstance(node, nir.Input):
                values[name] = image
                continue
            total = sum(values[source] for source in self.inputs[name])
            assert isinstance(total, Tensor)
            if isinstance(node, nir.Output):
                return total
            if isinstance(node, (nir.IF, nir.LIF)):
                v = membranes.get(name, torch.zeros_like(total))
                values[name], membranes[name] = self._fire(node, self.tensors[name], total, v)
            else:
                values[name] = _stateless(node, self.tensors[name], total)
        raise ValueError("the NIR graph has no output")

    def _fire(self, node: Any, p: dict[str, Tensor], current: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(node, nir.LIF):
            v = v + self.dt / p["tau"] * (p["v_leak"] - v + p["r"] * current)
        else:
            v = v + self.dt * p["r"] * current
        fires = v > p["v_threshold"]
        return fires.to(current.dtype), torch.where(fires, p["v_reset"], v)


def _tensors(node: Any) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in vars(node).items() if _is_floats(value)}


def _is_floats(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _ints(value: Any) -> list[int]:
    return [int(part) for part in np.atleast_1d(value)]


def _stateless(node: Any, p: dict[str, Tensor], x: Tensor) -> Tensor:
    if isinstance(node, nir.Conv2d):
        stride, padding, dilation = (_ints(getattr(node, name)) for name in ("stride", "padding", "dilation"))
        return F.conv2d(x, p["weight"], p["bias"], stride, padding, dilation, int(node.groups))
    if isinstance(node, nir.Affine):
        return x @ p["weight"].T + p["bias"]
    if isinstance(node, nir.Linear):
        return x @ p["weight"].T
    if isinstance(node, nir.Scale):
        return x * p["scale"]
    if isinstance(node, nir.Threshold):
        return (x > p["threshold"]).to(x.dtype)
    if isinstance(node, nir.Flatten):
        start, end = int(node.start_dim), int(node.end_dim)
        return x.flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)
    if isinstance(node, (nir.AvgPool2d, nir.SumPool2d)):
        kernel, stride, padding = (_ints(getattr(node, name)) for name in ("kernel_size", "stride", "padding"))
        divisor = 1 if isinstance(node, nir.SumPool2d) else None
        return F.avg_pool2d(x, kernel, stride, padding, divisor_override=divisor)
    raise ValueError(f"NIR node {type(node).__name__} is not simulated here")
