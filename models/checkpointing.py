"""Gradient checkpointing of spiking networks: inside a block nothing but its input is kept, and it runs twice.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016, arXiv 1604.06174), by PyTorch's non-reentrant
`torch.utils.checkpoint`. Gradients, weights, running statistics and logits are those without it, bit for bit on a CPU:

- the second run draws the random numbers of the first, and works on copies of the block's buffers, so that running
  statistics move once;
- it exchanges nothing between processes: what batch norms found together in the first run is kept, (C,) each;
- the input is kept as `models.kept_train` packs it, and all that a block leaves pending is computed inside of it;
- forward hooks on modules inside of a block fire once (`models.hooks_once`); a block with forward pre-hooks inside
  keeps what it does without checkpointing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from models import hooks_once
from models.dsr import DSRNeuron
from models.kept_train import keep
from models.neuron import SpikingNeuron
from models.online import ONLINE
from models.ranks import Moments, active_group, recalling, remembering
from models.spiketrain import SpikeTrain
from models.sync import batch_norm_of

CHECKPOINTED = ("rate_m", "bptt", "dsr")
"""The algorithms whose backward pass needs what a block leaves behind."""

_NEURONS = (SpikingNeuron, DSRNeuron)
_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def check_checkpointing(network: nn.Module, algorithm: str) -> None:
    """
    Raises:
        ValueError: for an algorithm that has nothing to gain, or a network without blocks.
    """
    if algorithm not in CHECKPOINTED:
        why = "each step moves the neurons' state" if algorithm in ONLINE else "it goes through T steps without a graph"
        raise ValueError(f"gradient checkpointing goes with one of {CHECKPOINTED}, found {algorithm!r}: {why}")
    if not list(blocks_of(network)):
        raise ValueError(f"gradient checkpointing found no blocks in {type(network).__name__}")


@contextlib.contextmanager
def checkpointing(network: nn.Module) -> Iterator[None]:
    """The blocks of a network that run in here on spike trains with a graph keep nothing but their input."""
    blocks = list(blocks_of(network))
    layers = list(layers_beside(network, blocks))
    own = [vars(module).get("forward") for module in [*blocks, *layers]]
    try:
        for block in blocks:
            block.forward = _in_rows(block) if _is_row(block) else functools.partial(_run_module, block, block.forward)
        for layer in layers:
            layer.forward = functools.partial(_run_module, layer, layer.forward, if_small=True)
        yield
    finally:
        for module, forward in zip([*blocks, *layers], own, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


# -- which modules are blocks -------------------------------------------------------------------------


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a network, none inside of another: the outermost modules with neurons that are no stage.

    A stage is a container, or has containers of blocks (timm's CSP networks), or nothing but blocks (RegNet). Where
    layers stand in a row without blocks (VGG), the `nn.Sequential` of them is given.
    """
    for child in network.children():
        if not _composite(child):
            continue
        inner = list(blocks_of(child)) if isinstance(child, _CONTAINERS) or _is_stage(child) else []
        if inner:
            yield from inner
        elif not isinstance(child, _CONTAINERS) or _is_row(child):
            yield child


def layers_beside(network: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The neurons and max pools outside of the blocks: those of a stem, which sees more pixels than any block.

    Each is a block by itself where it is small what that keeps: the currents of an image that is the same at each step,
    or the spikes that are pooled.
    """
    for child in network.children():
        if isinstance(child, _POOLS) or (not _composite(child) and _has_neurons(child)):
            yield child
        elif not any(child is block for block in blocks):
            yield from layers_beside(child, blocks)


def _has_neurons(module: nn.Module) -> bool:
    return any(isinstance(inner, _NEURONS) for inner in module.modules())


def _composite(module: nn.Module) -> bool:
    """Whether it holds neurons among other things; timm's norms with an activation are one layer."""
    single = isinstance(module, (*_NEURONS, nn.modules.batchnorm._NormBase))
    return not single and _has_neurons(module)


def _is_stage(module: nn.Module) -> bool:
    children = list(module.children())
    containers = [child for child in children if isinstance(child, _CONTAINERS)]
    if any(not _is_row(block) for container in containers for block in blocks_of(container)):
        return True
    return not containers and all(_composite(child) for child in children)


def _is_row(module: nn.Module) -> bool:
    """Layers one behind the other."""
    return type(module).forward is nn.Sequential.forward


# -- running one --------------------------------------------------------------------------------------


def _run_module(module: nn.Module, forward: Callable, *args: Any, if_small: bool = False, **kwargs: Any) -> Any:
    inside = [child for child in module.modules() if child is not module]

    def through(args: tuple, kwargs: dict) -> Any:
        return forward(*args, **kwargs)

    return run_checkpointed([module, *inside], inside, through, args, kwargs, if_small=if_small)


def _in_rows(row: nn.Module) -> Callable[[Any], Any]:
    """The forward of a `nn.Sequential` of layers, each row of layers that ends in neurons a block by itself."""
    rows: list[list[nn.Module]] = [[]]
    for layer in row.children():
        rows[-1].append(layer)
        if any(isinstance(module, _NEURONS) for module in layer.modules()):
            rows.append([])

    def forward(x: Any) -> Any:
        for layers in rows:
            inside = [module for layer in layers for module in layer.modules()]
            through = functools.partial(functools.reduce, lambda x, layer: layer(x), layers)
            x = run_checkpointed(inside, inside, through, x) if layers is not rows[-1] else through(x)
        return x

    return forward


def run_checkpointed(
    modules: Sequence[nn.Module], inside: Sequence[nn.Module], function: Callable, *args: Any, if_small: bool = False
) -> Any:
    """``function(*args)``, which runs once more in the backward pass.

    Args:
        modules: those that it runs, whose buffers the second run must not move.
        inside: those whose hooks it calls.
        if_small: only where what is kept takes no more memory than one step of the input.
    """
    leaves, structure = tree_flatten(args)
    trains = {id(leaf): leaf for leaf in leaves if isinstance(leaf, SpikeTrain)}
    prepared = any(module._forward_pre_hooks for module in inside)
    if prepared or not torch.is_grad_enabled() or not any(t.kind in ("rate", "graph") for t in trains.values()):
        return function(*args)
    kept = {key: keep(train) for key, train in trains.items()}
    if if_small and _bytes(kept) > sum(train.shape.numel() * train.dtype.itemsize for train in trains.values()):
        return function(*args)
    slots, tensors = [], list[Tensor]()
    for key, (own, _) in kept.items():
        slots.append((key, kept[key][1], len(tensors), len(tensors) + len(own)))
        tensors += own
    plain = [None if id(leaf) in trains else leaf for leaf in leaves]
    keys = [id(leaf) if id(leaf) in trains else None for leaf in leaves]
    unused = [args]  # let go of by the first run, so that nothing keeps the trains but who made them
    listened = [module for module in inside if module._forward_hooks]
    group, moments = active_group(), list[Moments]()
    del leaves, trains, kept, args

    def run(*tensors: Tensor) -> Any:
        if unused:
            with remembering(moments), hooks_once.first_run(listened):
                return _settled(function(*unused.pop()))
        again = {key: restore(list(tensors[start:end])) for key, restore, start, end in slots}
        leaves = [leaf if key is None else again[key] for key, leaf in zip(keys, plain, strict=True)]
        with (
            _on_copies_of_buffers(modules),
            hooks_once.second_run(inside, listened),
            batch_norm_of(group),
            recalling(moments),
        ):
            return _settled(function(*tree_unflatten(leaves, structure)))

    return checkpoint(run, *tensors, use_reentrant=False)


def _bytes(kept: dict) -> int:
    return sum(tensor.nbytes for tensors, _ in kept.values() for tensor in tensors)


def _settled(output: Any) -> Any:
    """What the block leaves pending of its rates is computed inside of it: it would keep tensors of the block."""
    hooks_once.settle(output)
    return output


@contextlib.contextmanager
def _on_copies_of_buffers(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Running statistics, and counts of batches, that move in here are forgotten."""
    own = [
        (module, name, buffer) for module in modules for name, buffer in module._buffers.items() if buffer is not None
    ]
    try:
        for module, name, buffer in own:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in own:
            module._buffers[name] = buffer
