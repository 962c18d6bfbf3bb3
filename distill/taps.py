"""Taps: the places, named by timm, at which a teacher is cut without cutting it.

A forward hook on the tapped module appends rows to its output: the adapted features of the student. The rest of the
unmodified teacher turns them into logits like any other rows.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.twin import ACTIVATIONS


@dataclass(frozen=True, slots=True, eq=False)
class Tap:
    """A checked cut of the teacher.

    Args:
        name: the teacher's module.
        shape: (C, H, W) of the feature.
        activation: the activation that the feature has just passed, ready to end an adapter, or None where the
            feature has both signs (linear bottlenecks, residual sums).
    """

    name: str
    shape: tuple[int, int, int]
    activation: nn.Module | None


def default_tap_names(teacher: nn.Module) -> list[str]:
    """timm's `feature_info` modules without the stem's entry and without the last one (ResNet: layer1 to layer3).

    The first entry is a stage, not the stem, where it is numbered like the second (ConvNeXt: stages.0, stages.1).

    Raises:
        ValueError: if the network has no `feature_info` of names.
    """
    info = getattr(teacher, "feature_info", None)
    if info is not None and not isinstance(info, (list, tuple)):
        info = info.info
    names = [entry.get("module") for entry in info or []]
    if len(names) < 3 or not all(names):
        raise ValueError(f"{type(teacher).__name__} names no cuts in feature_info: name them yourself as taps=[...]")
    (parent, _, child), (second_parent, _, second_child) = (name.rpartition(".") for name in names[:2])
    first_is_stage = parent == second_parent and child.isdigit() and second_child.isdigit()
    return names[0 if first_is_stage else 1 : -1]


def check_taps(teacher: nn.Module, names: Sequence[str], images: Tensor) -> list[Tap]:
    """Checks that each name is a cut, on one batch, and puts the taps in the order in which they fire.

    A tap must fire once in a forward pass, yield one tensor (B, C, H, W), and be a cut: the same feature injected for
    two images gives equal logits, so that nothing goes around it.

    Args:
        teacher: in evaluation mode.
        names: modules of the teacher, each once.
        images: (B, C, H, W) with at least two different images.

    Raises:
        ValueError: names the tap that cannot serve, and why.
    """
    if len(images) < 2 or (images == images[:1]).all():
        raise ValueError(f"taps are checked on two or more different images, found shape {tuple(images.shape)}")
    modules = {name: _submodule(teacher, name) for name in names}
    if len(modules) < len(names):
        raise ValueError(f"taps must differ from each other, found {list(names)}")
    outputs: dict[str, Tensor] = {}
    activations: dict[str, nn.Module] = {}

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if name in outputs:
                raise ValueError(f"tap {name!r} fires more than once in a forward pass")
            if not isinstance(output, Tensor):
                raise ValueError(f"tap {name!r} yields a {type(output).__name__}, not one tensor")
            if output.ndim != 4:
                raise ValueError(f"tap {name!r} yields shape {tuple(output.shape)}, not a map (B, C, H, W)")
            outputs[name] = output.clone()
            if last and last[0] is output:
                activations[name] = last[1]

        return hook

    last: list = []  # output and module of the activation that ran last

    def remember(module: nn.Module, args: tuple, output: Tensor) -> None:
        last[:] = [output, module]

    # the activations' hooks come first: where a tap is an activation itself, it must find itself remembered
    acts = [(m, remember) for m in teacher.modules() if isinstance(m, ACTIVATIONS)]
    with torch.no_grad(), hooks([*acts, *[(m, record(name)) for name, m in modules.items()]]):
        own = teacher(images)
    for name in modules:
        if name not in outputs:
            raise ValueError(f"tap {name!r} does not fire in a forward pass of the teacher")
    taps = []
    for name, output in outputs.items():  # in the order of firing
        _check_cut(teacher, name, output, images, own)
        activation = activations.get(name)
        if activation is None and output.min() >= 0 and output.max() > 0:
            activation = nn.ReLU()  # a functional activation leaves this trace only
        taps.append(Tap(name, tuple(output.shape[1:]), _fresh(activation)))  # type: ignore[arg-type]
    return taps


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


def _check_cut(teacher: nn.Module, name: str, feature: Tensor, images: Tensor, own: Tensor) -> None:
    same = feature[:1].expand_as(feature)
    with torch.no_grad(), hooks([(teacher.get_submodule(name), lambda *_: same.clone())]):
        logits = teacher(images)
    difference = (logits - logits[:1]).abs().max().item()
    if not difference <= rounding(own):
        raise ValueError(
            f"tap {name!r} is not a cut of {type(teacher).__name__}: with the same feature injected for different "
            f"images the logits differ by {difference:.2g}, so something goes around it (inside a residual?)"
        )


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
    """A forward hook that appends rows (B, C, H, W) to a module's output."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        rows = features.to(output.dtype)
        return torch.cat([output, rows]) if len(output) else rows  # rows alone keep their memory format

    return hook
