"""Where timm says that a network may be cut: its stages, and the blocks inside of them.

Names only; `distill.taps` checks what serves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
"""No blocks, though timm's norms with an activation have children."""


def feature_info(network: nn.Module) -> list[Mapping[str, Any]]:
    """timm's entries, one for each stage; an empty list where a network has none."""
    info = getattr(network, "feature_info", None) or []
    return list(info if isinstance(info, (list, tuple)) else info.info)


def default_tap_names(teacher: nn.Module) -> list[str]:
    """The stages: timm's `feature_info` modules without the stem's entry and without the last one.

    ResNet: layer1 to layer3. The first entry is a stage, not the stem, where it is numbered like the second (ConvNeXt:
    stages.0, stages.1). Where all entries are blocks of one resolution (ViT, MLP-Mixer), the blocks at a quarter, half
    and three quarters of the depth.

    Raises:
        ValueError: if the network has no `feature_info` of names.
    """
    entries = feature_info(teacher)
    names = [entry.get("module") or "" for entry in entries]
    chosen = _spread(names) if _isotropic(entries) else names[0 if _first_is_stage(names) else 1 : -1]
    if not chosen or not all(chosen) or (len(names) < 3 and not _isotropic(entries)):
        raise ValueError(f"{type(teacher).__name__} names no cuts in feature_info: name them yourself as taps=[...]")
    return list(chosen)


def block_names(teacher: nn.Module) -> list[list[str]]:
    """Candidates for blocks: for each part of the network, its blocks, with the part itself at the end.

    Parts are timm's stages and what lies beside them in the same container (EfficientNet: blocks.0 to blocks.6). The
    blocks of a part are its children, of its containers or, where it has none, its own (RegNet: s1.b1), that have
    parameters and children themselves. Where all of timm's entries are blocks (ViT), they are the candidates.
    """
    modules = dict(teacher.named_modules())
    if _isotropic(feature_info(teacher)):
        return [[name] for entry in feature_info(teacher) if (name := entry.get("module")) in modules and name]
    parts: dict[str, nn.Module] = {}
    names = [name for entry in feature_info(teacher) if (name := entry.get("module")) in modules and name]
    for name in names[0 if _first_is_stage(names) else 1 :]:
        parent = modules[name.rpartition(".")[0]]
        beside = parent is not teacher and isinstance(parent, (nn.Sequential, nn.ModuleList))
        for child in [key for key, _ in parent.named_children()] if beside else [name.rpartition(".")[2]]:
            path = f"{name.rpartition('.')[0]}.{child}".lstrip(".")
            if _is_block(modules[path]):
                parts.setdefault(path, modules[path])
    top_level = {name for name in parts if "." not in name}
    return [[*_blocks_of(name, part, own=name in top_level), name] for name, part in parts.items()]


def _blocks_of(path: str, part: nn.Module, own: bool) -> Iterator[str]:
    """The blocks of the containers in a part; where it holds no container, its own children if `own`."""
    children = [(f"{path}.{name}", child) for name, child in part.named_children()]
    if not isinstance(part, (nn.Sequential, nn.ModuleList)):
        containers = [(name, child) for name, child in children if isinstance(child, (nn.Sequential, nn.ModuleList))]
        if containers or not own:
            for name, container in containers:
                yield from _blocks_of(name, container, own=False)
            return
    for name, child in children:
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _blocks_of(name, child, own=False)
        elif _is_block(child):
            yield name


def _is_block(module: nn.Module) -> bool:
    has_parameters = next(module.parameters(), None) is not None
    return has_parameters and next(module.children(), None) is not None and not isinstance(module, NORMS)


def _first_is_stage(names: list[str]) -> bool:
    (parent, _, child), (second_parent, _, second_child) = (name.rpartition(".") for name in [*names, "", ""][:2])
    return parent == second_parent and child.isdigit() and second_child.isdigit()


def _isotropic(entries: list[Mapping[str, Any]]) -> bool:
    """Whether every entry is a block, one behind the other at one resolution."""
    parents = {(entry.get("module") or "").rpartition(".")[0] for entry in entries}
    reductions = {entry.get("reduction") for entry in entries}
    return len(entries) > 1 and len(parents) == len(reductions) == 1 and reductions != {None}


def _spread(names: list[str]) -> list[str]:
    depth = len(names)
    return list(dict.fromkeys(names[max(1, depth * quarters // 4) - 1] for quarters in (1, 2, 3)))
