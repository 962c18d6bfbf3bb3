"""What words on a command line and in a recipe mean besides what they do in YAML: 1,2,4 is a list, none is null."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

NONE = ("none", "None")

NUMBERS = re.compile(r"{0}(,\s*{0})*".format(r"[-+]?[\d.]+(e[-+]?\d+)?"))


def with_lists(argv: Sequence[str], config_class: type) -> list[str]:
    """Numbers with commas between them, or one alone, in the brackets that a list has in YAML: 1,2,4 as [1,2,4]."""
    names = {name for name, kind in _fields(config_class) if {list[int], list[float]} & {kind, *get_args(kind)}}
    return _replaced(argv, names, lambda _, value: f"[{value}]" if NUMBERS.fullmatch(value) else value)


def with_nulls(argv: Sequence[str], config_class: type) -> list[str]:
    """none and None as null, where they are the value of a field that may be None; groups in braces, too."""
    names = _optional(config_class)
    groups = {name for name, kind in _fields(config_class) if dataclasses.is_dataclass(kind)}

    def meant(name: str, value: str) -> str:
        if name in groups:
            return recipe_with_nulls(value, config_class, f"{name}.") if value.startswith("{") else value
        return "null" if value in NONE else value

    return _replaced(argv, names | groups, meant)


def recipe_with_nulls(text: str, config_class: type, prefix: str = "") -> str:
    """The same for YAML, in which quotes keep "none" a text; everything else stays as it is written.

    Args:
        prefix: of the fields in there, "train." for those of the group train.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # whoever reads it says so
        return text
    marks = {node.start_mark.index for node in _values(root, _optional(config_class), prefix) if _is_none(node)}
    for start in sorted(marks, reverse=True):
        text = f"{text[:start]}null{text[start + len('none') :]}"
    return text


def _optional(config_class: type) -> set[str]:
    """Fields that may be None, without those for which none is a choice of its own."""
    found = set()
    for name, kind in _fields(config_class):
        choices = [
            choice for part in (kind, *get_args(kind)) if get_origin(part) is Literal for choice in get_args(part)
        ]
        if NoneType in get_args(kind) and not set(NONE) & set(choices):
            found.add(name)
    return found


def _fields(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and types of all fields and groups."""
    for name, kind in get_type_hints(config_class).items():
        yield prefix + name, kind
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{prefix}{name}.")  # type: ignore[arg-type]


def _values(node: yaml.Node | None, names: set[str], prefix: str) -> Iterator[yaml.ScalarNode]:
    """Those of some fields, by dotted names; not what is inside of lists and dictionaries that are a field's value."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.ScalarNode) and name in names:
            yield value
        elif any(other.startswith(f"{name}.") for other in names):
            yield from _values(value, names, f"{name}.")


def _is_none(node: yaml.ScalarNode) -> bool:
    return node.style is None and node.value in NONE


def _replaced(argv: Sequence[str], names: set[str], meant: Callable[[str, str], str]) -> list[str]:
    """A command line whose values of some fields are what `meant(name, value)` gives."""
    result = []
    for before, argument in zip(["", *argv], argv, strict=False):
        option, equals, value = argument.partition("=")
        if equals and option.removeprefix("--") in names and option.startswith("--"):
            argument = f"{option}={meant(option.removeprefix('--'), value)}"
        elif before.startswith("--") and before.removeprefix("--") in names:
            argument = meant(before.removeprefix("--"), argument)
        result.append(argument)
    return result
