"""Scales and shifts that go into the weights of a layer, in place. C_in input, C_out output channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def scale_input(layer: Any, factor: Tensor) -> None:
    """Makes layer(x) what layer(factor * x) was, for `factor` (C_in,) above 0."""
    if isinstance(layer, _BatchNorm):
        assert layer.running_mean is not None and layer.running_var is not None
        # gamma (f x - mean) / sqrt(var + eps): eps does not scale, so that gamma makes up for it
        eps: float = layer.eps
        std = torch.sqrt(layer.running_var + eps)
        layer.running_mean /= factor
        layer.running_var /= factor**2
        layer.weight.mul_(factor * torch.sqrt(layer.running_var + eps) / std)
        return
    weight, factor = layer.weight, factor.to(layer.weight.dtype)
    groups = getattr(layer, "groups", 1)
    of_group = factor.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)  # (C_out, C_in / groups)
    weight *= of_group.view(*of_group.shape, *[1] * (weight.ndim - 2))


@torch.no_grad()
def scale_output(layer: Any, factor: Tensor) -> None:
    """Makes layer(x) what factor * layer(x) was, for `factor` (C_out,)."""
    layer.weight *= factor.to(layer.weight.dtype).view(-1, *[1] * (layer.weight.ndim - 1))
    if layer.bias is not None:
        layer.bias *= factor.to(layer.bias.dtype)


@torch.no_grad()
def shift_output(layer: Any, shift: Tensor) -> None:
    """Adds `shift` (C_out,) to what the layer gives."""
    layer.bias += shift.to(layer.bias.dtype)
