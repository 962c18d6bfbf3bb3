"""Inference a time step at a time: the logits so far after each step, for those who stop early.

Each step is a traversal of the network on one step's input. The membranes lie on a `Tape`, which the iterator owns: no
neuron keeps anything, other calls of the network may come in between, and an abandoned iterator takes its state along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models.layout import at_least_float32
from models.spiketrain import SpikeTrain
from models.tape import Tape


def cumulative_logits(traverse: Callable[[SpikeTrain], SpikeTrain], inputs: Iterator[Tensor]) -> Iterator[Tensor]:
    """The mean of the logits of steps 1 to t, for t = 1, 2, ...; (B, classes), in the type of a step's logits.

    Args:
        traverse: runs the network on a spike train.
        inputs: of each step, (B, C, H, W); asked for when that step runs.
    """
    tape = Tape(timesteps=1)
    total: Tensor | None = None
    for number, images in enumerate(inputs, 1):
        # no context is open while the caller has the word: gradients and autocast are the caller's own there
        with torch.no_grad():
            tape.rewind()
            logits = traverse(SpikeTrain.constant(images, 1, "plain_step", tape)).rate
            wide = at_least_float32(logits)
            total = wide if total is None else total + wide
            mean = (total / number).to(logits.dtype)
        yield mean
