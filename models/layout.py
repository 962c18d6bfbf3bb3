"""How a spike stream lies in memory: the folded tensor that convolutions see, and the view that passes over time take.

Shapes: S stored steps (1 or T), B images, C channels.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def layout(folded: Tensor, steps: int) -> Tensor:
    """A folded tensor (S*B, C, ...) as its memory lies: (S, rows, C) or (S, B, C, pixels); a view."""
    if folded.ndim == 2:
        return rearrange(folded, "(s b) c -> s b c", s=steps)
    if is_channels_last(folded):
        return rearrange(folded, "(s b) c h w -> s (b h w) c", s=steps)
    return rearrange(folded.flatten(2), "(s b) c pixels -> s b c pixels", s=steps)


def from_layout(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `layout` for a tensor made from `like` (any number of steps): (S, ...) -> (S*B, C, ...)."""
    if like.ndim == 2:
        return x.flatten(0, 1)
    if is_channels_last(like):
        return x.view(-1, *like.shape[2:], like.shape[1]).permute(0, 3, 1, 2)
    return x.flatten(0, 1).view(-1, *like.shape[1:])


def channels_are_last(like: Tensor) -> bool:
    """Whether a channel's numbers lie C apart: in the layout of channels_last, and of vectors."""
    return like.ndim == 2 or is_channels_last(like)


def images_apart(x: Tensor, like: Tensor, steps: int) -> Tensor:
    """A layout whose images have an axis of their own: (S, B, C), (S, B, pixels, C) or (S, B, C, pixels); a view."""
    return x.unflatten(1, (like.shape[0] // steps, like.shape[2] * like.shape[3])) if is_channels_last(like) else x


def sum_of_images(x: Tensor, channels_last: bool) -> Tensor:
    """(B, C), (B, pixels, C) or (B, C, pixels) summed up to (C,): each image, then all.

    In this order the compiler shares the work among images, and goes through them once; all at once a GPU has hardly
    more to share it among than channels, where the number of images is not known to the compiler.
    """
    return (x if x.ndim == 2 else x.sum(1 if channels_last else 2)).sum(0)


def is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def mean_over_steps(folded: Tensor, steps: int) -> Tensor:
    """The mean over time of a folded stream: (S*B, ...) -> (B, ...)."""
    if steps == 1:
        return folded
    if folded.ndim < 2 or not (folded.is_contiguous() or is_channels_last(folded)):
        return folded.unflatten(0, (steps, -1)).mean(0)
    # as the memory lies: a mean of another view is slow, and comes in another memory format
    return from_layout(layout(folded, steps).mean(0, keepdim=True), folded)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dense(x: Tensor) -> Tensor:
    """The tensor in one of the two memory formats that have a layout."""
    return x.contiguous() if x.ndim > 2 and not (is_channels_last(x) or x.is_contiguous()) else x


def in_memory_format_of(like: Tensor, x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if is_channels_last(like) else torch.contiguous_format)
