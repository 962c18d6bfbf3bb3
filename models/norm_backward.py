"""The backward pass of a layer's pending batch norms, fused with the neuron's kappa: sums first, then gradients.

y = (x - mu) invstd w + b with the statistics of the stream and x the mean over time (Yu et al., NeurIPS 2024, section
4.3). With g = kappa dL/dr the gradient of the mean current, N = B*H*W and sums over images and pixels,

    db = sum g      dw = invstd sum g (x - mu)
    dx = w invstd (g - [sum g + (x - mu) invstd^2 sum g (x - mu)] / N)    the bracket only for statistics of this batch

which is PyTorch's `native_batch_norm_backward` handed these statistics: that runs where nothing is compiled. Where the
statistics are those of several processes together (`models.sync`), the sums and N of the bracket are, too: one
collective for a layer of neurons, however many norms it has. db and dw stay local, because DDP averages them.
Shapes: B images, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.compiling import compilable, is_compiling
from models.layout import (
    channels_are_last,
    dense,
    from_layout,
    images_apart,
    in_memory_format_of,
    layout,
    sum_of_images,
)
from models.normalization import Norm
from models.ranks import sums_over_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Needs = tuple[bool, bool, bool]


def norms_backward(
    grad: Tensor,
    kappa: Tensor,
    norms: Sequence[Norm | None],
    rates: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    needs: Sequence[Needs],
) -> list[Tensor | None]:
    """Gradients of the addends of a neuron's mean current.

    Args:
        grad: dL/dr, (B, C, ...).
        kappa: dr/dcbar, likewise.
        norms: the pending norm of each addend, or None.
        rates: each addend's rate before its norm, (B, C, ...); None without a norm.
        weights: the norm's weight, (C,), or None.
        needs: which of rate, weight and bias of each addend want a gradient.

    Returns:
        dL/drate, dL/dweight and dL/dbias of each addend, one after the other.
    """
    group = _group(norms)
    if not any(norms) or not (is_compiling() or group is not None):
        return _as_written(grad * kappa, norms, rates, weights, needs)
    like = dense(kappa)
    last = channels_are_last(like)

    def shaped(v: Tensor) -> Tensor:
        return v if last else v[:, None]

    def laid_out(x: Tensor) -> Tensor:
        return images_apart(layout(in_memory_format_of(like, x), 1), like, 1)[0]

    g, k = laid_out(grad.to(like.dtype)), laid_out(like)
    present = [i for i, norm in enumerate(norms) if norm is not None]
    xs = [laid_out(rates[i]) for i in present]  # type: ignore[arg-type]
    means = [norms[i].mean for i in present]  # type: ignore[union-attr]
    sums = _sums(g, k, xs, [shaped(mean) for mean in means], last)
    total, products = sums[0], sums[1:]
    count: int | Tensor = g.numel() // total.numel()
    total_of_all, products_of_all = total, products
    if group is not None and any(needs[i][0] for i in present):
        total_of_all, *products_of_all, count = sums_over_ranks([*sums, total.new_full((1,), count)], group)
    maps = []
    grads: list[Tensor | None] = [None] * (3 * len(norms))
    for i, mean, product, product_of_all in zip(present, means, products, products_of_all, strict=True):
        norm, weight = norms[i], weights[i]
        assert norm is not None
        scale = norm.invstd if weight is None else norm.invstd * weight.detach()
        of_batch = (mean, scale * total_of_all / count, scale * norm.invstd.square() * product_of_all / count)
        maps.append(tuple(shaped(v) for v in ((scale, *of_batch) if norm.of_batch else (scale,))))
        _, needs_weight, needs_bias = needs[i]
        if weight is not None and needs_weight:
            grads[3 * i + 1] = (norm.invstd * product).to(weight.dtype)
        if needs_bias:
            grads[3 * i + 2] = total.to(total.dtype if weight is None else weight.dtype)
    outputs = _inputs(g, k, xs, maps, len(present) < len(norms))
    for i, output in zip(present, outputs, strict=False):
        grads[3 * i] = from_layout(output[None], like)
    for i, norm in enumerate(norms):
        if norm is None:
            grads[3 * i] = from_layout(outputs[-1][None], like)
    return grads


def _group(norms: Sequence[Norm | None]) -> ProcessGroup | None:
    """The processes whose batches the statistics come from, together; None for this process's own."""
    groups = {norm.group for norm in norms if norm is not None and norm.of_batch}
    assert len(groups) <= 1, "the norms of a layer run in one forward pass"
    return groups.pop() if groups else None


def _as_written(grad_current, norms, rates, weights, needs) -> list[Tensor | None]:
    grads: list[Tensor | None] = []
    for norm, rate, weight, wanted in zip(norms, rates, weights, needs, strict=True):
        grads += [grad_current, None, None] if norm is None else norm.backward(grad_current, rate, weight, wanted)
    return grads


@compilable
def _sums(grad: Tensor, kappa: Tensor, xs: list[Tensor], means: list[Tensor], channels_last: bool) -> list[Tensor]:
    """sum g, and sum g (x - mu) of each norm: (C,)."""
    g = _current_gradient(grad, kappa)
    products = [g * (x.to(g.dtype) - mean) for x, mean in zip(xs, means, strict=True)]
    return [sum_of_images(part, channels_last) for part in (g, *products)]


@compilable
def _inputs(grad: Tensor, kappa: Tensor, xs: list[Tensor], maps: list[tuple], plain: bool) -> list[Tensor]:
    """dL/dx of each norm and, where it is asked for, g itself, in the type of `grad`."""
    g = _current_gradient(grad, kappa)
    outputs: list[Any] = []
    for x, (scale, *of_batch) in zip(xs, maps, strict=True):
        dx = g * scale
        if of_batch:
            mean, offset, slope = of_batch
            dx = dx - offset - (x.to(g.dtype) - mean) * slope
        outputs.append(dx.to(grad.dtype))
    return [*outputs, g.to(grad.dtype)] if plain else outputs


def _current_gradient(grad: Tensor, kappa: Tensor) -> Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return grad.to(dtype) * kappa.to(dtype)
