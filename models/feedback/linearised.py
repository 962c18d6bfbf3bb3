"""The loop at its measured averages, linearised: what carries gradients, or backward spikes, from layer to layer.

With a_i = clip(c_i / theta, 0, 1) at the averages and m_i = [0 < a_i < 1], a gradient v of a_i becomes

    W_i^T (s_i m_i v / theta)

for a_{i-1}, where W_i is the linear layer and s_i the scale of norm and dropout behind it. The first layer has two
inputs; inside of the loop it is F alone that counts, from a_n to a_1.

Shapes: B images; v and a_i are (B, C_i, ...).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.feedback.maps import Current
from models.normalization import per_channel


class TransposedMap:
    """From the gradient of a layer's average to that of its input's.

    Args:
        current: the layer's map.
        average: a_i.
        input_shape: of the gradient that it gives.
        threshold: theta.
    """

    def __init__(self, current: Current, average: Tensor, input_shape: torch.Size, threshold: float) -> None:
        self.linear = current.linear
        self.mask = (average > 0) & (average < 1)
        """m_i."""
        self._dropped = current.drop.mask
        self._scale = None if current.norm is None else current.norm.scale()
        self._input_shape = input_shape
        self._threshold = threshold
        self._factor: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        return transposed(self.linear, v * self._factor_of(v), self._input_shape)

    def _factor_of(self, v: Tensor) -> Tensor:
        """s_i m_i / theta, made in the backward pass: until then a byte for each neuron is kept."""
        if self._factor is None:
            factor = self.mask.to(v.dtype) / self._threshold
            factor = factor if self._dropped is None else factor * self._dropped
            self._factor = factor if self._scale is None else factor * per_channel(self._scale, factor)
        return self._factor


def transposed(linear: nn.Module, v: Tensor, input_shape: torch.Size) -> Tensor:
    """The transpose of a linear layer without its bias."""
    weight = linear.weight.detach().to(v.dtype)  # type: ignore[union-attr, operator]
    if isinstance(linear, nn.Linear):
        return v @ weight
    assert isinstance(linear, nn.Conv2d | nn.ConvTranspose2d)
    of_input, _, _ = torch.ops.aten.convolution_backward(
        v,
        v.new_empty(()).expand(input_shape),
        weight,
        None,
        list(linear.stride),
        list(linear.padding),  # type: ignore[arg-type]
        list(linear.dilation),
        linear.transposed,
        list(linear.output_padding),
        linear.groups,
        [True, False, False],
    )
    return of_input


class LinearisedLoop:
    """One turn of the loop.

    Args:
        feedback: from the last layer to the first.
        currents: of layers 2 to n.
        averages: a_1 to a_n.
        threshold: theta.
    """

    def __init__(
        self, feedback: Current, currents: Sequence[Current], averages: Sequence[Tensor], threshold: float
    ) -> None:
        inputs = [averages[-1], *averages[:-1]]
        self.maps = [
            TransposedMap(current, average, x.shape, threshold)
            for current, average, x in zip([feedback, *currents], averages, inputs, strict=True)
        ]
        """That of layer i gives the gradient of a_{i-1}, that of layer 1 the gradient of a_n."""

    def turn(self, v: Tensor) -> Tensor:
        """J^T v: from the gradient of a_n once around to that of a_n."""
        for transposed_map in reversed(self.maps):
            v = transposed_map(v)
        return v

    def gradients(self, beta: Tensor) -> list[Tensor]:
        """The gradients of a_1 to a_n that belong to beta, that of a_n at the solution."""
        found = [beta]
        for transposed_map in reversed(self.maps[1:]):
            found.append(transposed_map(found[-1]))
        return found[::-1]
