"""The teacher's blocks behind its taps, run on features that are handed to them.

Rows appended to a tapped module's output go through the rest of the unmodified teacher like any other rows. What the
teacher runs on in front of them is nothing (a batch of no image) where its code takes that, else one blank image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.precision import without_tf32
from distill.taps import Tap, append_rows, hooks, rounding


@dataclass(frozen=True, slots=True, eq=False)
class TeacherFeature:
    """What one pass of the teacher leaves of a tap.

    Args:
        size: (H, W) of the feature as a map.
        prefix: (B, P, C), its class and register tokens, or None.
        map: (B, C, H, W), or None where nobody asked for it.
    """

    size: tuple[int, int]
    prefix: Tensor | None
    map: Tensor | None


def look(
    teacher: nn.Module, taps: Sequence[Tap], images: Tensor, *, maps: bool = False
) -> tuple[Tensor, dict[str, TeacherFeature]]:
    """One pass of the teacher on images (B, C, H, W), without a graph.

    Args:
        maps: whether the features themselves are wanted.

    Returns:
        logits (B, K) and what each tap left, by name.
    """
    features: dict[str, TeacherFeature] = {}
    image_size: tuple[int, int] = tuple(images.shape[-2:])  # type: ignore[assignment]

    def keep(tap: Tap):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            prefix = tap.layout.prefix(output)
            # copies: the blocks behind may work in place
            features[tap.name] = TeacherFeature(
                tap.layout.size(output, image_size),
                None if prefix is None else prefix.clone(),
                tap.layout.to_map(output, image_size).clone() if maps else None,
            )

        return hook

    with torch.no_grad(), hooks([(teacher.get_submodule(tap.name), keep(tap)) for tap in taps]):
        logits = teacher(images)
    return logits, features


def run_tails(
    teacher: nn.Module,
    taps: Sequence[Tap],
    maps: Mapping[str, Tensor],
    prefixes: Mapping[str, Tensor | None],
    blank: Tensor,
) -> dict[str, Tensor]:
    """Sends each tap's map (B, C, H, W) through the teacher's blocks behind it.

    Args:
        taps: in the order in which they fire.
        prefixes: the class tokens of each tap, (B, P, C) or None.
        blank: (N, C, H, W), the images in front of the rows; N = 0 where the teacher takes that.

    Returns:
        logits (B, K) by tap.
    """
    rows = {tap.name: tap.layout.from_map(maps[tap.name], prefixes[tap.name]) for tap in taps}
    with hooks([(teacher.get_submodule(name), append_rows(row)) for name, row in rows.items()]):
        logits = teacher(blank)
    pieces = logits[len(blank) :].split([len(row) for row in rows.values()])
    return dict(zip(rows, pieces, strict=True))


@torch.no_grad()
@without_tf32()
def images_in_front(teacher: nn.Module, taps: Sequence[Tap], images: Tensor) -> int:
    """How many blank images the teacher has to run on in front of injected rows: 0 or 1, tried on its own features at
    all taps together and at each alone, where the blocks between two taps see nothing else.

    Raises:
        ValueError: if with neither its own features give its own logits.
    """
    expected, features = look(teacher, taps, images, maps=True)
    maps = {name: feature.map for name, feature in features.items()}
    prefixes = {name: feature.prefix for name, feature in features.items()}
    for count in (0, 1):
        blank = images.new_zeros(count, *images.shape[1:])
        try:
            found = [
                run_tails(teacher, some, maps, prefixes, blank)  # type: ignore[arg-type]  # maps were asked for
                for some in (taps, *[[tap] for tap in taps])
            ]
        except (RuntimeError, IndexError, ZeroDivisionError, ValueError, AssertionError):
            continue
        logits = [values for pass_ in found for values in pass_.values()]
        if all(v.isfinite().all() and (v - expected).abs().max() <= rounding(expected) for v in logits):
            return count
    names = [tap.name for tap in taps]
    raise ValueError(f"{type(teacher).__name__} does not reproduce its logits from its features at {names}")
