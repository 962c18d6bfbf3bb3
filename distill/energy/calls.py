"""Which module runs while operations are counted."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from torch import nn


class RunningModule:
    """The innermost module of a network that runs now, and how often it has asked for a name."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._path: list[str] = []
        self._asked: Counter[tuple[str, int]] = Counter()

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Follows one forward pass."""
        self._path.clear()
        self._asked.clear()
        handles = []
        for name, module in self._network.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._path.append(name)))
            # called also where the pass is ended inside of the module (SpikingNetwork's `until`)
            handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self._path.pop()

    def name_of_call(self, traversal: int = 0) -> str:
        """Its name, with the number of the call from the second on: an operation asks once.

        Args:
            traversal: which step runs, where the module runs a time step at a time: calls are numbered in each anew.
        """
        name = self._path[-1] if self._path else ""
        self._asked[name, traversal] += 1
        number = self._asked[name, traversal]
        return name if number == 1 else f"{name} (call {number})"
