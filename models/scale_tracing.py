"""Who can take the scale of a spike: found by sending an image through the analogue network, whose units are noted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.neuron import SpikingNeuron
from models.scale_rules import Traced, traced
from models.scale_trace import Refusal, Tag, Trace
from models.spiketrain import UnsupportedOperationError
from models.traversal import path_in_traceback
from models.twin import OnRate


def trace_scales(ann: nn.Module, twin: nn.Module, images: Tensor) -> Trace:
    """Runs images (B, C, H, W) through a network in evaluation mode and notes which layer can absorb which scale.

    Args:
        twin: a spiking twin of it, which says what became a neuron and what stayed analogue in a gate.

    Raises:
        UnsupportedOperationError: names the operation that is not known to keep scales and the module that asked for
            it, or the module whose input, or the layer whose output, cannot be scaled.
    """
    trace = Trace({id(p): name.rpartition(".")[0] for name, p in ann.named_parameters() if name.endswith("weight")})
    handles = []
    for name, module in twin.named_modules():
        if isinstance(module, (SpikingNeuron, OnRate)):
            activation = ann.get_submodule(name)
            tags: list[Tag] = []
            handles.append(activation.register_forward_pre_hook(_plain_input(tags)))
            after = _new_scale if isinstance(module, SpikingNeuron) else _real_numbers
            handles.append(activation.register_forward_hook(after(trace, name, tags)))
    try:
        with torch.no_grad():
            output = ann(traced(images, Tag(torch.zeros(images.shape[1], dtype=torch.long)), trace))
        if not isinstance(output, Traced) or not output.tag.real:
            raise Refusal("no layer behind the last neurons takes their scale")
        output.tag.read_by("the output")
        trace.check()
    except Refusal as error:
        where = path_in_traceback(ann, error)
        raise UnsupportedOperationError(f"{type(ann).__name__} cannot be calibrated: {error}, in {where}") from error
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _plain_input(tags: list[Tag]) -> Callable:
    def hook(module: nn.Module, args: tuple) -> tuple[Tensor]:
        tags.append(args[0].tag)
        return (args[0].as_subclass(Tensor).clone(),)  # an activation in place must not change what others read

    return hook


def _new_scale(trace: Trace, name: str, tags: list[Tag]) -> Callable:
    return lambda module, args, output: traced(output, trace.site(name, tags.pop(), output.shape[1]), trace)


def _real_numbers(trace: Trace, name: str, tags: list[Tag]) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        tag = tags.pop()
        if not tag.real:
            raise Refusal(f"no layer between the spikes and {name!r}, which is analogue, takes their scale")
        tag.read_by(name)
        return traced(output, Tag(tag.units), trace)

    return hook
