"""Convolutions of small maps on a CPU, as products of matrices.

oneDNN convolves a row of an output map at a time. Of a map of 4 x 4 a tile of AMX, which has 16 rows, is then three
quarters empty: with 512 channels in bfloat16 the gradient of the weight takes three times as long as the product of
all pixels at once (`benchmarks/results/2026-11-27_small_maps.md`). The last stage of a network for images of 32 x 32
pixels has such maps and most of the weights.

Shapes: B images (of all steps), C channels, K numbers in a kernel, P pixels of an output map.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.profiler import record_function

from models.layout import is_channels_last

PROFILED_AS = "convolution of small maps"
"""What profilers call it: all of it, the copies, too."""
PIXELS = 16
"""The most pixels of an output map that is small: a tile's rows."""
PIXELS_FORWARD = 4
"""The same for the forward pass, which has the T steps to fill a tile with: of larger ones two threads gain nothing."""
PAIRS = 2**17
"""The fewest pairs of an input and an output channel for which a product pays its copies."""
PAIRS_OF_WEIGHT = 2**15
"""The same for the gradient of the weight in half precision, which gains most."""
ROWS = 512
"""Output pixels of a product: what is copied for them stays in the cache, and does not grow with the batch."""


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`torch.nn.functional.conv2d`, under autocast as well, by whichever way is faster.

    Args:
        x: (B, C_in, H, W).
        weight: (C_out, C_in/groups, k, k).
        bias: (C_out,) or None.
        stride, padding, dilation: two numbers each.
    """
    types, autocast = {v.dtype for v in (x, weight, bias) if v is not None}, torch.is_autocast_enabled("cpu")
    mixed = torch.float64 in types if autocast else len(types) > 1
    small = not mixed and _is_small(x, weight, stride, padding, dilation, groups, PAIRS)
    if not small or not (_is_product(x, weight, stride, padding) or _has_graph(x, weight, bias)):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if autocast:
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with record_function(PROFILED_AS):
        return _Convolution.apply(x, weight, bias, stride, padding)


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_shape: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    needed: list[bool],
    dtype_of_weight: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """`torch.ops.aten.convolution_backward`, each gradient by whichever way is faster; products have no graph.

    Args:
        dtype_of_weight: of the weight's gradient where it is a product, which is then not copied once more to get it.
    """
    pairs = PAIRS if x.dtype == torch.float32 else PAIRS_OF_WEIGHT
    small = not transposed and _is_small(x, weight, stride, padding, dilation, groups, pairs)
    of_x, of_weight, of_bias = needed
    as_products = [of_x and small and _pairs(weight) >= PAIRS, of_weight and small]
    # with the bias's gradient oneDNN computes that of the weight, wanted or not
    sum_up = of_bias and as_products[1]
    others = [of_x and not as_products[0], of_weight and not as_products[1], of_bias and not sum_up]
    found: list[Tensor | None] = [None, None, None]
    if any(others):
        geometry = (stride, padding, dilation, transposed, output_padding, groups)
        found = list(torch.ops.aten.convolution_backward(grad, x, weight, bias_shape, *geometry, others))
    if not any(as_products):
        return tuple(found)
    with record_function(PROFILED_AS), torch.autocast("cpu", enabled=False):
        if as_products[0]:
            found[0] = _input_gradient(grad, x, weight, stride, padding)
        if as_products[1]:
            found[1] = _weight_gradient(grad, x, weight, stride, padding, dtype_of_weight or grad.dtype)
        if sum_up:
            found[2] = grad.sum((0, 2, 3))
    return tuple(found)


class _Convolution(Function):
    """The convolution of small maps with its gradients; the arguments are those of `convolve`."""

    @staticmethod
    def forward(x, weight, bias, stride, padding):
        if not _is_product(x, weight, stride, padding):
            return F.conv2d(x, weight, bias, stride, padding)
        size, kernels = _output_size(x, weight, stride, padding), _kernels(weight).t()
        product = x.new_empty(x.shape[0] * math.prod(size), weight.shape[0])
        images = _images_at_a_time(size)
        for part, rows in zip(x.split(images), product.split(images * math.prod(size)), strict=True):
            columns = _columns(_windows(part, weight, stride, padding))
            if bias is None:
                torch.mm(columns, kernels, out=rows)
            else:
                torch.addmm(bias, columns, kernels, out=rows)
        return product.view(x.shape[0], *size, -1).permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, bias, *ctx.geometry = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_shape = None if bias is None else list(bias.shape)

    @staticmethod
    def backward(ctx: Any, grad):
        x, weight = ctx.saved_tensors
        # products have no graph, which gradients of gradients need
        backward: Any = torch.ops.aten.convolution_backward if torch.is_grad_enabled() else convolution_backward
        geometry: Any = (*ctx.geometry, [1, 1], False, [0, 0], 1)
        return (*backward(grad, x, weight, ctx.bias_shape, *geometry, list(ctx.needs_input_grad[:3])), None, None)


def _is_small(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pairs: int,
) -> bool:
    """Whether a product is faster; float64, which is for comparisons, and exported networks have PyTorch's own."""
    if x.device.type != "cpu" or x.ndim != 4 or groups != 1 or dilation != [1, 1] or x.dtype == torch.float64:
        return False
    if _pairs(weight) < pairs or weight.shape[2:].numel() == 1 or not is_channels_last(x):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if min(stride) < 1 or min(padding) < 0:  # for PyTorch to refuse
        return False
    size = _output_size(x, weight, stride, padding)
    return x.shape[0] > 0 and min(size) > 0 and math.prod(size) <= PIXELS


def _is_product(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether the forward pass is one, too."""
    return math.prod(_output_size(x, weight, stride, padding)) <= PIXELS_FORWARD


def _has_graph(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _pairs(weight: Tensor) -> int:
    return weight.shape[0] * weight.shape[1]


def _output_size(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> list[int]:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in sizes]


def _images_at_a_time(size: list[int]) -> int:
    return max(1, ROWS // math.prod(size))


def _windows(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """What an output pixel sees with each row of the kernels, (B, height, width, k, k*C_in): one run of memory."""
    height, width = _output_size(x, weight, stride, padding)
    rows, columns = weight.shape[2:]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    of_image, of_row, of_pixel, _ = padded.stride()
    size = (x.shape[0], height, width, rows, columns * x.shape[1])
    return padded.as_strided(size, (of_image, of_row * stride[0], of_pixel * stride[1], of_row, 1))


def _columns(windows: Tensor) -> Tensor:
    """The windows of all output pixels, of some or all rows of the kernels: (B*P, numbers of a window)."""
    return windows.reshape(-1, windows.shape[3] * windows.shape[4])


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """The gradient of x: each number is the sum, in float32, of what the kernel's positions give it."""
    (height, width), (rows, columns) = grad.shape[2:], weight.shape[2:]
    kernels, images = _kernels(weight), _images_at_a_time([height, width])
    padded = [n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True)]
    inner = [slice(p, p + n) for n, p in zip(x.shape[2:], padding, strict=True)]
    found = torch.empty_like(x, dtype=grad.dtype)
    for part, written in zip(grad.split(images), found.split(images), strict=True):
        shares = (_rows(part) @ kernels).view(part.shape[0], height, width, rows, columns, x.shape[1])
        total = x.new_zeros(part.shape[0], *padded, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        for i in range(rows):
            for j in range(columns):
                down = slice(i, i + stride[0] * (height - 1) + 1, stride[0])
                across = slice(j, j + stride[1] * (width - 1) + 1, stride[1])
                total[:, down, across] += shares[:, :, :, i, j]
        written.permute(0, 2, 3, 1).copy_(total[:, inner[0], inner[1]])
    return found


def _weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dtype: torch.dtype
) -> Tensor:
    """The gradient of the weight, a row of the kernels at a time: what is copied for it is a row's."""
    grads, windows = _rows(grad).t(), _windows(x, weight, stride, padding)
    found = torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last)
    for i in range(weight.shape[2]):
        row = slice(i, i + 1)
        found[:, :, row].copy_(_as_weight(grads @ _columns(windows[:, :, :, row]), weight[:, :, row]))
    return found


def _rows(maps: Tensor) -> Tensor:
    """(B, C, H, W) as (B*P, C)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _kernels(weight: Tensor) -> Tensor:
    """(C_out, C_in, k, k) as (C_out, K*C_in)."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _as_weight(kernels: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `_kernels`."""
    return kernels.view(weight.shape[0], *weight.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)
