"""The spikes of a layer of neurons as bits: what is kept of them between the layers that read them.

A convolution wants numbers, T of them for each neuron, and whoever holds its input (the code of a network does until it
has run the whole stage) holds them all. Of the neurons of a rate pass each has a byte for eight steps, too: the numbers
go when a layer has read them (`Term.release`), a later one has them made again, and neurons that add them to their
current (the shortcut of a residual block) read the bits themselves.

Shapes: T time steps, B images, C channels, K = ceil(T / 8) bytes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from models.compiling import compilable, is_compiling
from models.layout import from_layout, layout

BITS = 8
"""Steps that a byte holds."""


class SpikeBits(NamedTuple):
    """T steps of spikes."""

    bytes: Tensor
    """uint8, (K*B, C, ...), folded as a stream is: step t is bit t % 8 of byte t // 8."""
    timesteps: int
    dtype: torch.dtype
    """Of the spikes as numbers."""

    @property
    def bytes_per_neuron(self) -> int:
        """K."""
        return bytes_of(self.timesteps)

    @property
    def shape(self) -> torch.Size:
        """Of one step, (B, C, ...)."""
        return torch.Size((self.bytes.shape[0] // self.bytes_per_neuron, *self.bytes.shape[1:]))

    @torch.no_grad()  # always: a compiled kernel is made anew for another grad mode
    def stream(self) -> Tensor:
        """The spikes as numbers in {0, 1}, (T*B, C, ...), in the memory format that they had."""
        layouts = layout(self.bytes, self.bytes_per_neuron)
        unpack = _unpack if is_compiling() else _unpack_in_turn
        return from_layout(unpack(layouts, self.timesteps, self.dtype), self.bytes)

    @torch.no_grad()
    def counts(self) -> Tensor:
        """How often each neuron fired, uint8 (B, C, ...), for T up to 255."""
        return from_layout(_count(layout(self.bytes, self.bytes_per_neuron), self.timesteps)[None], self.bytes)


def bytes_of(timesteps: int) -> int:
    """K."""
    return -(-timesteps // BITS)


def spikes_of_step(layouts: Tensor, t: int) -> Tensor:
    """The spikes of step t, (rows, C) or (B, C, pixels), float32 in {0, 1}, from the layout (K, ...) of the bytes."""
    # exact, and numbers all the way: beside bfloat16 a CPU's compiler has no vectors of the integers that shift
    byte = layouts[t // BITS].to(torch.float32)
    return torch.floor(byte * 2.0 ** -(t % BITS)) - 2 * torch.floor(byte * 2.0 ** -(t % BITS + 1))


@compilable
def _unpack(layouts: Tensor, timesteps: int, dtype: torch.dtype) -> Tensor:
    return torch.stack([spikes_of_step(layouts, t).to(dtype) for t in range(timesteps)])


def _unpack_in_turn(layouts: Tensor, timesteps: int, dtype: torch.dtype) -> Tensor:
    """`_unpack` as it is fast where each operation is a pass of its own: in bytes, and a step at a time."""
    stream = layouts.new_empty(timesteps, *layouts.shape[1:], dtype=dtype)
    for t, step in enumerate(stream):
        step.copy_((layouts[t // BITS] >> (t % BITS)) & 1)
    return stream


@compilable
def _count(layouts: Tensor, timesteps: int) -> Tensor:
    return functools.reduce(torch.add, [spikes_of_step(layouts, t) for t in range(timesteps)]).to(torch.uint8)
