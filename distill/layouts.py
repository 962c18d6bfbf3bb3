"""How a teacher lays its features out, and the way to a map (B, C, H, W) and back.

Convolutional networks give maps (B, C, H, W), timm's Swin and its like (B, H, W, C), transformers and MLP mixers
tokens (B, N, C): the patches row by row, often with class or register tokens in front.

Shapes: B images, C channels, H x W places of the map, P prefix tokens, N = P + H W tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from distill.checks import check
from distill.precision import widest_float
from distill.tap_names import feature_info

Kind = Literal["BCHW", "BHWC", "BNC"]
KINDS: tuple[str, ...] = get_args(Kind)
MOST_PREFIX_TOKENS = 5
"""Guessed where timm does not tell: a class token, a distillation token or four registers and a class token."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a teacher's module lays its features out.

    Args:
        kind: the order of the axes.
        prefix_tokens: class and register tokens in front of the patches, only with BNC.
    """

    kind: Kind = "BCHW"
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        check(self.kind in KINDS, "kind", self.kind, f"one of {list(KINDS)}")
        check(self.prefix_tokens >= 0, "prefix_tokens", self.prefix_tokens, "0 or more")
        check(self.kind == "BNC" or not self.prefix_tokens, "prefix_tokens", self.prefix_tokens, "0 in a map")

    def size(self, feature: Tensor, image_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the map of a feature in the teacher's form, for images of that height and width in pixels.

        Raises:
            ValueError: if the patch tokens form no grid with the image's aspect ratio.
        """
        if self.kind == "BCHW":
            return feature.shape[2], feature.shape[3]
        if self.kind == "BHWC":
            return feature.shape[1], feature.shape[2]
        grid = grid_of(feature.shape[1] - self.prefix_tokens, image_size)
        if grid is None:
            raise ValueError(
                f"{feature.shape[1]} tokens less {self.prefix_tokens} form no grid with the aspect ratio of "
                f"{image_size[0]} x {image_size[1]} pixels"
            )
        return grid

    def to_map(self, feature: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The map (B, C, H, W) of a feature in the teacher's form; prefix tokens are dropped."""
        if self.kind == "BCHW":
            return feature
        if self.kind == "BHWC":
            return rearrange(feature, "b h w c -> b c h w")
        h, w = self.size(feature, image_size)
        return rearrange(feature[:, self.prefix_tokens :], "b (h w) c -> b c h w", h=h, w=w)

    def prefix(self, feature: Tensor) -> Tensor | None:
        """The prefix tokens (B, P, C) of a feature in the teacher's form, None where there are none."""
        return feature[:, : self.prefix_tokens] if self.prefix_tokens else None

    def from_map(self, features: Tensor, prefix: Tensor | None = None) -> Tensor:
        """The teacher's form of a map (B, C, H, W), with the prefix tokens (B, P, C) in front of its patches.

        Raises:
            ValueError: if there are more or fewer prefix tokens than the teacher's.
        """
        found = 0 if prefix is None else prefix.shape[1]
        if found != self.prefix_tokens:
            raise ValueError(f"the teacher's features have {self.prefix_tokens} prefix tokens, found {found}")
        if self.kind == "BCHW":
            return features
        if self.kind == "BHWC":
            return rearrange(features, "b c h w -> b h w c")
        tokens = rearrange(features, "b c h w -> b (h w) c")
        return tokens if prefix is None else torch.cat([prefix.to(tokens.dtype), tokens], 1)


def find_layout(teacher: nn.Module, name: str, feature: Tensor, image_size: tuple[int, int]) -> Layout:
    """The layout of one feature of the teacher's module `name`, for images of that height and width in pixels.

    Tokens: as many in front as timm says (`num_prefix_tokens`) where the others form a grid, else as few as possible.
    Four axes: channels lie where timm's `feature_info` has their number, else where the other two axes have the
    image's aspect ratio, else where timm says (`output_fmt`), else before the two others.

    Raises:
        ValueError: names the tap and its shape, if it has neither three nor four axes, the tokens form no grid, or no
            two axes have the image's aspect ratio, up to a factor of two (Nest: windows, and patches in each).
    """
    if feature.ndim == 3:
        return Layout("BNC", _prefix_tokens(teacher, name, feature, image_size))
    if feature.ndim != 4:
        raise ValueError(
            f"tap {name!r} yields shape {tuple(feature.shape)}, not a map (B, C, H, W) or (B, H, W, C) "
            "and not tokens (B, N, C)"
        )
    first, middle, last = feature.shape[1:]
    channels = {entry.get("num_chs") for entry in feature_info(teacher) if entry.get("module") == name}
    if (first in channels) != (last in channels):
        return Layout("BCHW" if first in channels else "BHWC")
    fits_first, fits_last = _fits((middle, last), image_size), _fits((first, middle), image_size)
    if fits_first != fits_last:
        return Layout("BCHW" if fits_first else "BHWC")
    if not fits_first and not any(_about(grid, image_size) for grid in ((middle, last), (first, middle))):
        raise ValueError(
            f"tap {name!r} yields shape {tuple(feature.shape)}, of which no two axes are a map with the aspect ratio "
            f"of {image_size[0]} x {image_size[1]} pixels"
        )
    return Layout("BHWC" if getattr(teacher, "output_fmt", None) == "NHWC" else "BCHW")


def grid_of(tokens: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """(H, W) with H W = tokens that some stride makes of an image of that height and width; None: there is none.

    H and W may both be rounded up, or both down; the grid nearest to the image's aspect ratio is taken.
    """
    fitting = [
        (height, tokens // height)
        for height in range(1, tokens + 1)
        if tokens % height == 0 and _fits((height, tokens // height), image_size)
    ]
    ratio = image_size[0] / image_size[1]
    return min(fitting, key=lambda grid: abs(math.log(grid[0] / grid[1] / ratio)), default=None)


def _fits(grid: tuple[int, int], image_size: tuple[int, int]) -> bool:
    """Whether one stride s, a real number, gives (h / s, w / s) = (H, W), both rounded down or both rounded up.

    H = floor(h / s) is h / (H + 1) < s <= h / H; the strides of both axes overlap where -h < h W - w H < w.
    H = ceil(h / s) is h / H <= s < h / (H - 1); they overlap where -w < h W - w H < h.
    """
    (height, width), (h, w) = grid, image_size
    skew = h * width - w * height
    return -h < skew < w or -w < skew < h


def _about(grid: tuple[int, int], image_size: tuple[int, int]) -> bool:
    """Up to a factor of two, which convolutions without padding may take from one side."""
    (height, width), (h, w) = grid, image_size
    return height * w <= 2 * width * h and width * h <= 2 * height * w


def _prefix_tokens(teacher: nn.Module, name: str, feature: Tensor, image_size: tuple[int, int]) -> int:
    told = getattr(teacher, "num_prefix_tokens", None)
    grids = {
        prefix: grid
        for prefix in [*([told] if isinstance(told, int) else []), *range(MOST_PREFIX_TOKENS + 1)]
        if (grid := grid_of(feature.shape[1] - prefix, image_size)) is not None
    }
    h, w = image_size
    exact = [prefix for prefix, (height, width) in grids.items() if height * w == width * h]
    for prefix in [*exact, *grids]:  # of images that are not square, some stride rounds to many a number of tokens
        return prefix
    raise ValueError(
        f"tap {name!r} yields shape {tuple(feature.shape)}: its tokens, less up to {MOST_PREFIX_TOKENS} in front, form "
        f"no grid with the aspect ratio of {image_size[0]} x {image_size[1]} pixels"
    )


def quadrants_followed(layout: Layout, features: Tensor, image_size: tuple[int, int]) -> tuple[float, float]:
    """Whether the corners of a map follow one quadrant of the image each, and whether it is their own.

    A network may hold its tokens in an order of its own (Hiera: those that are pooled together lie apart); then a
    place follows a quadrant, but hardly more often than by chance its own. Only the corners, a quarter of the map's
    height and width, are looked at: places in between see several quadrants.

    Args:
        features: in the teacher's form, those of an image and of its four versions by `change_quadrants`.

    Returns:
        how many times as much a place changes with the quadrant that it follows as with the other three (the median
        over places), and the share of places that follow their own; (1, 1) for maps of fewer than 4 x 4 places.
    """
    maps = layout.to_map(features, image_size).to(widest_float(features.device))
    change = (maps[1:] - maps[:1]).norm(dim=1)  # of each place, (4, H, W)
    if min(change.shape[1:]) < 4:
        return 1.0, 1.0
    corners = torch.stack([change[:, r, c].flatten(1) for r, c in _corners(change.shape[1:], share=4)])  # (4, 4, n)
    most, followed = corners.max(1)  # (corner, n)
    selectivity = most / ((corners.sum(1) - most) / 3).clamp_min(torch.finfo(corners.dtype).tiny)
    own = followed == torch.arange(4, device=followed.device)[:, None]
    return selectivity.median().item(), own.to(maps.dtype).mean().item()


def change_quadrants(image: Tensor) -> Tensor:
    """An image (1, C, H, W) and four copies, of which each has noise in another quadrant, (5, C, H, W)."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(image)
    versions = image.repeat(5, 1, 1, 1)
    for version, (rows, columns) in zip(versions[1:], _corners(image.shape[2:], share=2), strict=True):
        version[:, rows, columns] += noise[0, :, rows, columns]
    return versions


def _corners(sides: Sequence[int], share: int) -> list[tuple[slice, slice]]:
    """Top left, top right, bottom left, bottom right, each a share-th of the height and width, rounded down."""
    rows, columns = [(slice(0, side // share), slice(side - side // share, side)) for side in sides]
    return list(itertools.product(rows, columns))
