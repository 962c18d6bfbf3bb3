"""Mean and variance of each channel over all steps of a stream, in one pass; for a batch norm's statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from models.compiling import compilable, is_compiling
from models.layout import at_least_float32, channels_are_last, images_apart, layout, sum_of_images


def moments(folded: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel over all steps, (C,), of a folded stream (S*B, C, ...)."""
    if not is_compiling():
        # the statistics of PyTorch's own batch norm, several times as fast as torch.var_mean on a CPU; in the type
        # of the running statistics, which for a bfloat16 stream would otherwise be bfloat16
        unused = folded.new_zeros(folded.shape[1], dtype=torch.promote_types(folded.dtype, torch.float32))
        return torch.batch_norm_update_stats(folded, unused, unused.clone(), 0.0)
    return _moments(images_apart(layout(folded, steps), folded, steps), channels_are_last(folded))


@compilable
def _moments(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    x32 = at_least_float32(x)
    # one pass instead of two: about one of the numbers, so that a large mean cancels nothing
    centre = (x32[0, 0, :1] if channels_last else x32[0, 0, :, :1]) if x.ndim == 4 else x32[0, 0]
    shifted = x32 - centre
    sums = [sum_of_images(part.flatten(0, 1), channels_last) for part in (shifted, shifted * shifted)]
    mean, square = (part / (x.numel() // part.numel()) for part in sums)
    return mean + centre.view(-1), (square - mean * mean).clamp_min(0)
