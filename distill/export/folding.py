"""Batch norms go into the layer in front of them, zero padding into the convolution behind it."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from distill.export.leaves import ChannelAffine

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def fold(graph: fx.GraphModule, dtype: torch.dtype) -> None:
    """Leaves no `ChannelAffine`; layers are of type `dtype` then, folded in float64."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and isinstance(getattr(graph, node.target), ChannelAffine):
            _fold_norm(graph, node)
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and isinstance(getattr(graph, node.target), nn.Conv2d):
            _fold_padding(graph, node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    graph.to(dtype)


def _fold_norm(graph: fx.GraphModule, node: fx.Node) -> None:
    norm: Any = getattr(graph, node.target)  # type: ignore[arg-type]
    (source,) = node.all_input_nodes
    layer: Any = getattr(graph, source.target) if source.op == "call_module" else None  # type: ignore[arg-type]
    channels_first = not isinstance(layer, nn.Linear) or len(node.meta["shape"]) == 1
    if isinstance(layer, LAYERS) and channels_first and len(source.users) == 1:
        _scale_output(layer, norm.scale, norm.shift)
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
    else:
        _make_explicit(graph, node, norm)


def _scale_output(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """scale * (W x + b) + shift = (scale W) x + (scale b + shift)"""
    weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    bias = shift if layer.bias is None else layer.bias.double() * scale + shift
    layer.weight, layer.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))


def _make_explicit(graph: fx.GraphModule, node: fx.Node, norm: Any) -> None:
    """A norm with no layer in front of it: a depthwise 1x1 convolution, or of vectors a product and a sum."""
    channels, axes = len(norm.scale), len(node.meta["shape"]) - 1
    if axes > 0:
        kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        layer = kind(channels, channels, 1, groups=channels)
        layer.weight = nn.Parameter(norm.scale.reshape(channels, *[1] * (axes + 1)), requires_grad=False)
        layer.bias = nn.Parameter(norm.shift, requires_grad=False)
        setattr(graph, node.target, layer)  # type: ignore[arg-type]
        return
    names = [f"{node.target}_{name}" for name in ("scale", "shift")]
    value: Any = node.args[0]
    with graph.graph.inserting_before(node):
        for name, tensor, function in zip(names, (norm.scale, norm.shift), (operator.mul, operator.add), strict=True):
            graph.register_buffer(name, tensor)
            value = graph.graph.call_function(function, (value, graph.graph.get_attr(name)))
            value.meta["shape"] = node.meta["shape"]
    node.replace_all_uses_with(value)
    graph.graph.erase_node(node)


def _fold_padding(graph: fx.GraphModule, node: fx.Node) -> None:
    """Zeros on both sides alike, as timm's Conv2dSame pads an image of a given size."""
    conv: nn.Conv2d = getattr(graph, node.target)  # type: ignore[arg-type]
    (source,) = node.all_input_nodes
    sides = zero_padding(source)
    if sides is None or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return
    left, right, top, bottom = sides
    if left == right and top == bottom:
        conv.padding = (conv.padding[0] + top, conv.padding[1] + left)
        node.replace_input_with(source, source.args[0])  # type: ignore[arg-type]


def zero_padding(node: fx.Node) -> tuple[int, int, int, int] | None:
    """(left, right, top, bottom) of a node that pads maps with zeros; None for any other."""
    if node.op != "call_function" or node.target not in (F.pad, torch._C._nn.pad):
        return None
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    sides: Any = given["pad"]
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0) or len(sides) > 4:
        return None
    left, right, top, bottom = [*sides, 0, 0][:4] if len(sides) == 2 else sides
    return (left, right, top, bottom) if min(left, right, top, bottom) >= 0 else None
