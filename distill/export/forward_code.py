"""The forward of a plain graph as lines of Python that a person could have written."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from distill.export.loops import states_of

_INFIX = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/"}


def forward_lines(graph: fx.GraphModule) -> list[str]:
    """From the argument `x` to a return. A name is used again as soon as its value is: nothing is kept for longer.

    What the step before has left (`distill.export.loops`) is an attribute of `self`: None before the first.
    """
    nodes = list(graph.graph.nodes)
    states = states_of(graph)
    left = {fed: before.target for before, fed in states.items()}
    last_use = {source: i for i, node in enumerate(nodes) for source in node.all_input_nodes}
    names: dict[fx.Node, str] = {}
    lines = []
    for i, node in enumerate(nodes):
        if node.op == "get_attr":
            names[node] = f"self.{node.target}"
        elif node in states:
            names[node] = str(node.target)
            zeros = f"x.new_zeros(len(x), {', '.join(map(str, node.meta['shape']))})"
            lines.append(f"{node.target} = {zeros} if self.{node.target} is None else self.{node.target}")
        elif node.op == "placeholder":
            names[node] = "x"
        elif node.op == "output":
            lines.append(f"return {literal(node.args[0], names)}")
        else:
            text = _call(node, names)
            in_use = {name for source, name in names.items() if last_use.get(source, -1) > i}
            names[node] = next(name for name in _free_names() if name not in in_use)
            lines.append(f"{names[node]} = {text}")
        if node in left:
            lines.append(f"self.{left[node]} = {names[node]}")
    return lines


def literal(value: Any, names: dict[fx.Node, str] | None = None) -> str:
    """A value as Python text, nodes by their names."""
    if isinstance(value, fx.Node):
        assert names is not None
        return names[value]
    if isinstance(value, slice):
        return f"slice({', '.join(literal(part, names) for part in (value.start, value.stop, value.step))})"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(literal(part, names) for part in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, float) and not math.isfinite(value):  # "-inf", as repr has it, is no Python
        return f'float("{value}")'
    return "..." if value is Ellipsis else repr(value)


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    args = [literal(arg, names) for arg in node.args]
    words = ", ".join([*args, *(f"{name}={literal(value, names)}" for name, value in node.kwargs.items())])
    if node.op == "call_module":
        return f"self.{node.target}({words})"
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({words[len(args[0]) :].removeprefix(', ')})"
    if node.target in _INFIX:
        return f" {_INFIX[node.target]} ".join(args)
    if node.target is operator.neg:
        return f"-{args[0]}"
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    return f"{_function_names()[node.target]}({words})"


@functools.cache
def _function_names() -> dict[Any, str]:
    """Functions of torch by the name that the written file knows them by."""
    found = {}
    for module, name in ((torch, "torch"), (F, "F")):  # where both have it, F
        for key in dir(module):
            value = getattr(module, key)
            if callable(value) and not key.startswith("_") and value.__hash__ is not None:
                found[value] = f"{name}.{key}"
    return found


def _free_names():
    yield from ("x", "y", "z")
    yield from (f"x{i}" for i in range(2, 10**6))
