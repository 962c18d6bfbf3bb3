"""Taps: the places, named by timm, at which a teacher is cut without cutting it.

A forward hook on the tapped module appends rows to its output: the adapted features of the student. The rest of the
unmodified teacher turns them into logits like any other rows. Rows are in the teacher's own form (`distill.layouts`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distill.layouts import Layout, change_quadrants, find_layout, quadrants_followed
from distill.precision import without_tf32
from distill.tap_names import block_names, default_tap_names, feature_info
from models.twin import ACTIVATIONS

__all__ = ["Tap", "append_rows", "check_taps", "default_tap_names", "hooks", "rounding", "tap_names"]

Granularity = Literal["stages", "blocks"]
MAPS = Layout()


@dataclass(frozen=True, slots=True, eq=False)
class Tap:
    """A checked cut of the teacher.

    Args:
        name: the teacher's module.
        shape: (C, H, W) of the feature's map; H and W are those of the images that it was checked on.
        activation: the activation that the feature has just passed, ready to end an adapter, or None where the
            feature has both signs (linear bottlenecks, residual sums).
        layout: how the teacher lays the feature out.
    """

    name: str
    shape: tuple[int, int, int]
    activation: nn.Module | None
    layout: Layout = MAPS


@without_tf32()
def tap_names(teacher: nn.Module, taps: Sequence[str] | Granularity, images: Tensor) -> list[str]:
    """The names of taps, from a word or as written.

    Args:
        teacher: in evaluation mode.
        taps: "stages": ends of stages (`default_tap_names`); "blocks": every block that is a cut, but the last one,
            behind which there is nothing but the head; or names, which pass unchanged.
        images: (B, C, H, W) with at least two different images, on which blocks are checked.

    Raises:
        ValueError: for another word, or a network in which timm names no place of the kind.
    """
    if not isinstance(taps, str):
        return list(taps)
    if taps not in get_args(Granularity):
        raise ValueError(f"taps must be a list of names or one of {list(get_args(Granularity))}, found {taps!r}")
    if taps == "stages":
        return default_tap_names(teacher)
    return _block_taps(teacher, images)


@without_tf32()
def check_taps(teacher: nn.Module, names: Sequence[str], images: Tensor) -> list[Tap]:
    """Checks that each name is a cut, on one batch, and puts the taps in the order in which they fire.

    A tap must fire once in a forward pass, yield one tensor, (B, C, H, W), (B, H, W, C) or (B, N, C), and be a cut: the
    same feature injected for two images gives equal logits, so that nothing goes around it. Tokens must lie in the
    order of the image, row by row, and what is behind the tap must take more rows than the network was given images.

    Args:
        teacher: in evaluation mode.
        names: modules of the teacher, each once.
        images: (B, C, H, W) with at least two different images.

    Raises:
        ValueError: names the tap that cannot serve, and why.
    """
    modules = {name: _submodule(teacher, name) for name in names}
    if len(modules) < len(names):
        raise ValueError(f"taps must differ from each other, found {list(names)}")
    probe = _probe(teacher, modules, images)
    for refusal in probe.refused.values():
        raise ValueError(refusal)
    for name in probe.features:
        if reason := probe.why_not(name):
            raise ValueError(reason)
    return [probe.tap(name) for name in probe.features]  # in the order of firing


def _block_taps(teacher: nn.Module, images: Tensor) -> list[str]:
    groups = block_names(teacher)
    modules = {name: teacher.get_submodule(name) for names in groups for name in names}
    probe = _probe(teacher, modules, images)
    serves = {name for name in probe.features if probe.why_not(name) is None}
    for *blocks, part in groups:
        if serves.intersection(blocks):  # its end is the end of its last block, or one norm or change of size later
            serves.discard(part)
    deepest = {id(probe.raw[name]): name for name in sorted(serves, key=lambda name: name.count("."))}
    names = [name for name in probe.features if name in serves and deepest[id(probe.raw[name])] == name]
    last_stage = feature_info(teacher)[-1].get("module") if names else None
    names = names[:-1]  # nothing but the head is behind it
    if names and probe.raw[names[-1]] is probe.raw.get(last_stage or ""):  # and this was the head's first convolution
        names = names[:-1]
    if not names:
        raise ValueError(f"{type(teacher).__name__} has no blocks that are cuts: name your taps as taps=[...]")
    return names


@dataclass(eq=False)
class _Probe:
    """What a teacher's modules did in one forward pass, by name in the order of firing."""

    teacher: nn.Module
    images: Tensor
    modules: dict[str, nn.Module]
    own: Tensor = field(init=False)  # the teacher's logits
    raw: dict[str, Tensor] = field(default_factory=dict)  # the tensors themselves, whatever happened to them later
    features: dict[str, Tensor] = field(default_factory=dict)  # copies
    activations: dict[str, nn.Module] = field(default_factory=dict)  # those that have just run
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.images.shape[2], self.images.shape[3]

    def why_not(self, name: str) -> str | None:
        """Why a feature is no cut, or None."""
        try:
            layout = find_layout(self.teacher, name, self.features[name], self.image_size)
        except ValueError as error:
            return str(error)
        return (
            _around(self, name)
            or (None if layout.kind == "BCHW" else _out_of_order(self, name, layout))
            or _takes_no_rows(self, name)
        )

    def tap(self, name: str) -> Tap:
        feature = self.features[name]
        layout = find_layout(self.teacher, name, feature, self.image_size)
        activation = self.activations.get(name)
        if activation is None and feature.min() >= 0 and feature.max() > 0:
            activation = nn.ReLU()  # a functional activation leaves this trace only
        shape = layout.to_map(feature[:1], self.image_size).shape[1:]
        return Tap(name, tuple(shape), _fresh(activation), layout)  # type: ignore[arg-type]


def _probe(teacher: nn.Module, modules: dict[str, nn.Module], images: Tensor) -> _Probe:
    if len(images) < 2 or (images == images[:1]).all():
        raise ValueError(f"taps are checked on two or more different images, found shape {tuple(images.shape)}")
    probe = _Probe(teacher, images, modules)
    last: list = []  # output and module of the activation that ran last

    def remember(module: nn.Module, args: tuple, output: Tensor) -> None:
        last[:] = [output, module]

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if name in probe.features or name in probe.refused:
                probe.features.pop(name, None)
                probe.refused[name] = f"tap {name!r} fires more than once in a forward pass"
            elif not isinstance(output, Tensor):
                probe.refused[name] = f"tap {name!r} yields a {type(output).__name__}, not one tensor"
            elif len(output) != len(images):
                probe.refused[name] = f"tap {name!r} yields shape {tuple(output.shape)} for {len(images)} images"
            else:
                probe.raw[name], probe.features[name] = output, output.clone()
                if last and last[0] is output:
                    probe.activations[name] = last[1]

        return hook

    # the activations' hooks come first: where a tap is an activation itself, it must find itself remembered
    acts = [(m, remember) for m in teacher.modules() if isinstance(m, ACTIVATIONS)]
    with torch.no_grad(), hooks([*acts, *[(m, record(name)) for name, m in modules.items()]]):
        probe.own = teacher(images)
    if (probe.own == probe.own[:1]).all():
        raise ValueError(f"{type(teacher).__name__} gives all images the same logits (a head of zeros?): no cut shows")
    for name in modules:
        if name not in probe.features and name not in probe.refused:
            probe.refused[name] = f"tap {name!r} does not fire in a forward pass of the teacher"
    return probe


def _submodule(teacher: nn.Module, name: str) -> nn.Module:
    if name:  # the empty name is the teacher itself
        with contextlib.suppress(AttributeError):
            return teacher.get_submodule(name)
    parent = teacher
    for part in name.split("."):
        child = getattr(parent, part, None)
        if not isinstance(child, nn.Module):
            break
        parent = child
    near = [child for child, _ in parent.named_children()][:12]
    raise ValueError(f"tap {name!r} is no module of the teacher; there are {near}")


def _around(probe: _Probe, name: str) -> str | None:
    """Why a feature is no cut: what goes around it, or None."""
    feature, teacher = probe.features[name], type(probe.teacher).__name__
    same = feature[:1].expand_as(feature)
    with torch.no_grad(), hooks([(probe.modules[name], lambda *_: same.clone())]):
        logits = probe.teacher(probe.images)
    difference = (logits - logits[:1]).abs().max().item()
    if difference <= rounding(probe.own):
        return None
    return (
        f"tap {name!r} is not a cut of {teacher}: with the same feature injected for different "
        f"images the logits differ by {difference:.2g}, so something goes around it (inside a residual?)"
    )


def _out_of_order(probe: _Probe, name: str, layout: Layout) -> str | None:
    """Why tokens cannot be a map: they do not lie in the order of the image, or None."""
    found: list[Tensor] = []
    with torch.no_grad(), hooks([(probe.modules[name], lambda module, args, output: found.append(output.clone()))]):
        probe.teacher(change_quadrants(probe.images[:1]))
    selectivity, own = quadrants_followed(layout, found[0], probe.image_size)
    if selectivity < 2 or own > 0.6:  # mixed all over, or in order; a random order gives about a quarter
        return None
    places = tuple(found[0].shape[1:-1])
    return (
        f"tap {name!r} yields places {places} in an order that is not the image's, row by row: those in the corners "
        f"follow one quadrant of the image each, but only {100 * own:.0f} % of them their own"
    )


def _takes_no_rows(probe: _Probe, name: str) -> str | None:
    """Why rows cannot be appended to a feature, or None: its own go through the rest with one image in front."""
    reason = (
        f"tap {name!r} takes no rows beside those of the images: {type(probe.teacher).__name__} reshapes what is "
        "behind it by the number of images in front of it"
    )
    try:
        with torch.no_grad(), hooks([(probe.modules[name], append_rows(probe.features[name]))]):
            logits = probe.teacher(probe.images[:1])
    except (RuntimeError, IndexError, ValueError, AssertionError):
        return reason
    same = len(logits) == 1 + len(probe.own) and (logits[1:] - probe.own).abs().max().item() <= rounding(probe.own)
    return None if same else reason


def rounding(own: Tensor) -> float:
    """A difference of logits that rounding explains: other batch rows, other kernels, the same numbers.

    Args:
        own: the teacher's logits (B, K) of different images: an untrained network's are small and almost equal, and
            what goes around a cut is a share of their difference.
    """
    spread, size = (own - own[:1]).abs().max().item(), own.abs().max().item()
    return 1e-3 * spread + 100 * torch.finfo(own.dtype).eps * size


def _fresh(activation: nn.Module | None) -> nn.Module | None:
    if activation is None:
        return None
    activation = copy.deepcopy(activation)
    if hasattr(activation, "inplace"):
        activation.inplace = False  # type: ignore[assignment]
    return activation


@contextlib.contextmanager
def hooks(pairs: Sequence[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Forward hooks that last as long as the context."""
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def append_rows(features: Tensor) -> Callable:
    """A forward hook that appends rows in the teacher's own form, (B, C, H, W) or another, to a module's output."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        rows = features.to(output.dtype)
        return torch.cat([output, rows]) if len(output) else rows  # rows alone keep their memory format

    return hook
