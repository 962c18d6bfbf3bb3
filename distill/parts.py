"""Which of a network's parts a hybrid uses: the student's up to a tap, the teacher's behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill.taps import hooks
from models import SpikingNetwork
from models.compiling import uncompiled


def trained_until(student: SpikingNetwork, tap: str, images: Tensor) -> list[str]:
    """The student's parameters that a loss on the rate of its module `tap` reaches, found in the graph of one pass.

    Nothing is changed: batch norms are in evaluation mode for that pass.

    Args:
        images: (B, C, H, W); one is enough.
    """
    modes = {module: module.training for module in student.modules()}
    wanted = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    student.eval()
    student.training = True  # the student itself chooses the pass by it: the one that has a graph
    student.requires_grad_(True)
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), uncompiled():
            reached = _leaves(student(images[:1], until=tap))
    finally:
        for module, training in modes.items():
            module.training = training
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(wanted[name])
    return [name for name, parameter in student.named_parameters() if id(parameter) in reached]


def _leaves(output: Tensor) -> set[int]:
    """The identities of all tensors at the leaves of a graph."""
    found, seen, pending = set(), set(), [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        pending += [before for before, _ in node.next_functions]
    return found


class Calls:
    """The modules of a network that began before a tap ended, and those that ended behind it, from one whole pass.

    A module that holds the tap itself did both.

    Args:
        tap: a module that is called once.
        run: calls the network, from its start to its end.
    """

    def __init__(self, network: nn.Module, tap: str, run: Callable[[], object]) -> None:
        self.began_before: set[str] = set()
        self.ended_behind: set[str] = set()
        self._called: set[str] = set()
        done = False
        target = network.get_submodule(tap)

        def finish(module: nn.Module, args: tuple, output: object) -> None:
            nonlocal done
            done = True

        def begin(name: str) -> Callable:
            def hook(*_: object) -> None:
                self._called.add(name)
                if not done:
                    self.began_before.add(name)

            return hook

        def end(name: str) -> Callable:
            return lambda *_: self.ended_behind.add(name) if done else None

        modules = dict(network.named_modules())
        handles = [module.register_forward_pre_hook(begin(name)) for name, module in modules.items()]
        # the network itself need not be called as a module for its parts to be: it holds the tap
        for names in (self.began_before, self.ended_behind, self._called):
            names.add("")
        try:
            # a hook of the tap's own module counts before the tap is done: what is inside it, too, lies in front
            pairs = [(module, end(name)) for name, module in modules.items() if name != tap]
            with hooks([*pairs, (target, finish)]):
                run()
        finally:
            for handle in handles:
                handle.remove()

    def state_of(self, network: nn.Module, *, before: bool) -> list[str]:
        """The names in the network's `state_dict` of what belongs to the modules on one side of the tap.

        What a module uses of a child that it does not call (timm's relative position biases) is its own.
        """
        modules = self.began_before if before else self.ended_behind
        return [name for name in network.state_dict() if self._caller(name) in modules]

    def _caller(self, name: str) -> str:
        """The innermost module around a tensor that was called."""
        owner = name.rpartition(".")[0]
        while owner not in self._called:
            owner = owner.rpartition(".")[0]
        return owner
