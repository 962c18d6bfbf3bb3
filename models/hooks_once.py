"""Forward hooks on the modules of a block that runs twice: somebody who looks at a module sees it once.

In the first run a hook looks at trains whose rates are computed already, keeps what it saves by itself, and leaves no
cache behind in them; in the second run it is not called. So both runs save the same tensors in the same order, which is
what `torch.utils.checkpoint` needs.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from models.spiketrain import SpikeTrain


def settle(values: Any) -> list[SpikeTrain]:
    """Computes the rates that are pending, before norms, in the trains among nested values; returns the trains."""
    trains = [leaf for leaf in tree_leaves(values) if isinstance(leaf, SpikeTrain)]
    for train in trains:
        for term in train.terms if train.has_rate else ():
            term.rate_before_norm()
    return trains


@contextlib.contextmanager
def first_run(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The hooks of these modules look, and change nothing.

    Raises:
        ValueError: for a hook that returns an output of its own, which the second run would lack.
    """
    with _swapped({m: OrderedDict((k, _looking(h)) for k, h in m._forward_hooks.items()) for m in modules}):
        yield


@contextlib.contextmanager
def second_run(modules: Sequence[nn.Module], listened: Sequence[nn.Module]) -> Iterator[None]:
    """No hook of these modules is called; at those that had one in the first run rates are computed as they were."""

    def again(module: nn.Module, args: Any, output: Any) -> None:
        settle((args, output))

    hooks: dict[nn.Module, OrderedDict] = {module: OrderedDict() for module in modules}
    hooks |= {module: OrderedDict({-1: again}) for module in listened}
    with _swapped(hooks):
        yield


def _looking(hook: Callable) -> Callable:
    def look(module: nn.Module, *call: Any) -> None:
        trains = settle(call)
        caches = [(train.terms, train._rate) for train in trains]
        try:
            with saved_tensors_hooks(lambda x: x.detach(), lambda x: x):  # none of the block's
                result = hook(module, *call)
        finally:
            for train, (terms, rate) in zip(trains, caches, strict=True):
                train.terms, train._rate = terms, rate
        if result is not None:
            raise ValueError(
                f"a forward hook changes the output of a {type(module).__name__}, which runs twice under gradient "
                "checkpointing: set_grad_checkpointing(False)"
            )

    return look


@contextlib.contextmanager
def _swapped(hooks: dict[nn.Module, OrderedDict]) -> Iterator[None]:
    own = {module: module._forward_hooks for module in hooks}
    try:
        for module, swapped in hooks.items():
            module._forward_hooks = swapped
        yield
    finally:
        for module, kept in own.items():
            module._forward_hooks = kept
