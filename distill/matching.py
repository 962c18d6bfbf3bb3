"""Which module of a student stands for each tap of its teacher, where the user has not said so.

A twin answers by name. Two networks that differ are matched by stage: what timm calls `feature_info` cuts both into
stages, and stages are paired from the last one backwards, because it is the coarse end of networks that agrees (all
halve the image to about 1/32, stems differ).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import SpikeTrain, SpikingNetwork
from models.network import probing


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages of a network, in the order in which they run.

    Args:
        names: the module that ends each stage.
        isotropic: whether these are the blocks of a network without stages (ViT, Mixer), all at one resolution.
    """

    names: tuple[str, ...]
    isotropic: bool


def match_taps(taps: Sequence[str], teacher: nn.Module, student: SpikingNetwork, images: Tensor) -> dict[str, str]:
    """The student's module for each tap of the teacher.

    The same names where the student has all of them, yields maps there, and has no other stages than the teacher (a
    twin). Else by stage. A tap belongs to the first stage of the teacher that ends at it or behind it. Stages are
    paired from the last backwards; what the teacher has more in front goes to the student's first. Where one of the
    networks has no stages but a row of like blocks, and where the teacher names none at all (then the taps count as
    its stages, all in front of the last), the same relative depth: the student's last stage only for what ends the
    teacher.

    Args:
        taps: modules of the teacher, in any order.
        images: (B, C, H, W) that both networks take; the first is run through both.

    Returns:
        the student's module by tap, in the order of `taps`; modules may repeat, and never go back in depth.

    Raises:
        ValueError: for a tap that is no module of the teacher or does not run, or a student with neither the taps'
            names nor stages that yield maps, which needs ``student_taps`` from the user.
    """
    if not taps:
        return {}
    order = _firing_order(teacher, [*taps, *_named_stages(teacher).names], images)
    for tap in taps:
        if tap not in order:
            raise ValueError(f"tap {tap!r} is no module of {type(teacher).__name__} that runs in a forward pass")
    theirs = _running(_named_stages(teacher), order)
    ours = _named_stages(student)
    maps = _maps(student, [*taps, *ours.names], images)
    ours = Stages(names=tuple(name for name in ours.names if name in maps), isotropic=ours.isotropic)
    same_stages = not theirs.names or not ours.names or theirs.names == ours.names
    if same_stages and all(tap in maps for tap in taps):
        return {tap: tap for tap in taps}
    if not ours.names:
        missing = [tap for tap in taps if tap not in maps]
        raise ValueError(
            f"{type(student).__name__} yields no map (B, C, H, W) at {missing} and names no stages in feature_info: "
            "say in student_taps which of its modules stands for each tap"
        )
    return {tap: ours.names[_stage(tap, taps, order, theirs, ours)] for tap in taps}


def _stage(tap: str, taps: Sequence[str], order: dict[str, int], theirs: Stages, ours: Stages) -> int:
    """The index of the student's stage."""
    count = len(ours.names)
    if not theirs.names:
        place = sorted(taps, key=order.__getitem__).index(tap) + 1
        return _spread(place, len(taps), max(count - 1, 1))
    behind = [index for index, name in enumerate(theirs.names) if order[name] >= order[tap]]
    stage = behind[0] if behind else len(theirs.names) - 1
    from_last = len(theirs.names) - 1 - stage
    if theirs.isotropic or ours.isotropic:
        index = _spread(stage + 1, len(theirs.names), count)
        return min(index, max(count - 2, 0)) if from_last else index
    return max(count - 1 - from_last, 0)


def _spread(place: int, places: int, count: int) -> int:
    """Place 1 to `places` at the same relative depth among `count` stages, from 0: ceil(place/places * count) - 1."""
    return -(-place * count // places) - 1


def _named_stages(network: nn.Module) -> Stages:
    """What `feature_info` says, without the stem's entry."""
    info = getattr(network, "feature_info", None)
    entries = list(getattr(info, "info", info) or [])
    entries = [entry for entry in entries if entry.get("module")]
    names = list(dict.fromkeys(entry["module"] for entry in entries))
    isotropic = len(names) > 1 and len({entry.get("reduction") for entry in entries}) == 1
    if len(names) > 1 and not isotropic and _unnumbered(names[0]) != _unnumbered(names[1]):
        names = names[1:]  # the stem: a stage is named like the next one but for its number
    return Stages(names=tuple(names), isotropic=isotropic)


def _unnumbered(name: str) -> str:
    return name.rstrip("0123456789")


def _running(stages: Stages, order: dict[str, int]) -> Stages:
    """Without the names that are no modules, or none that run (some of timm's are not), in the order of firing."""
    names = sorted((name for name in stages.names if name in order), key=order.__getitem__)
    return Stages(names=tuple(names), isotropic=stages.isotropic)


@torch.no_grad()
def _firing_order(teacher: nn.Module, names: Iterable[str], images: Tensor) -> dict[str, int]:
    """When each module first returns in a forward pass; without those that are no modules or do not run."""
    order: dict[str, int] = {}
    clock = itertools.count()
    modules = dict(teacher.named_modules(remove_duplicate=False))
    modes = {module: module.training for module in modules.values()}
    # hooks fire in the order of registration where one module has several names: they share one moment
    found: dict[nn.Module, list[str]] = {}
    for name in dict.fromkeys(names):
        if name and name in modules:
            found.setdefault(modules[name], []).append(name)

    def hook(module: nn.Module, args: tuple, output: object) -> None:
        moment = next(clock)
        for name in found[module]:
            order.setdefault(name, moment)

    handles = [module.register_forward_hook(hook) for module in found]
    try:
        teacher.eval()(images[:1])
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return order


def _maps(student: SpikingNetwork, names: Iterable[str], images: Tensor) -> set[str]:
    """Which of these modules of the student yield a map (B, C, H, W) in a forward pass."""
    maps: set[str] = set()
    modules = dict(student.named_modules(remove_duplicate=False))

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, (SpikeTrain, Tensor)) and output.ndim == 4:
                maps.add(name)

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names if name and name in modules]
    try:
        with probing(student, timesteps=1):
            student(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return maps
