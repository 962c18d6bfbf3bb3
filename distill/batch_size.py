"""A batch that fits the device's memory, with as many images in a step of the optimizer as were asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn

from distill.backward import Backward
from distill.checkpoints import Checkpoints
from distill.preparation import channels_last
from distill.processes import Agreement
from distill.random_numbers import repeatable
from distill.train_config import TrainConfig
from models.ranks import alone

log = logging.getLogger(__name__)

LEAST = 2
"""Images of a batch: mixup wants pairs, and batch norm more than one number of a channel."""

RESERVE = 3
"""Copies of the trained parameters that a training holds besides: two of an Adam, one of DDP's gradients."""


def batch_that_fits(
    accelerator: Accelerator,
    model: nn.Module,
    backward: Backward,
    images: Tensor,
    config: TrainConfig,
    checkpoints: Checkpoints | None,
    steps: Sequence[int] = (0,),
) -> TrainConfig:
    """The configuration with `batch_size` halved, and `accumulate` doubled, until a batch fits on every process.

    A forward and a backward pass are tried in the memory format of the training, with as much memory taken as optimizer
    and DDP will want (`RESERVE`). They leave nothing else behind: no gradient, no statistics, no random number. Batch
    norms then see smaller batches. Where a run is resumed, the batch is that of its checkpoint, unless a smaller one is
    asked for now.

    Args:
        model: not prepared, on the device, in training mode.
        backward: a batch's passes.
        images: (B, C, H, W), or event frames (T, B, C, H, W), of the size that is trained on.
        config: unchanged where `find_batch_size` is false.
        checkpoints: of the stage, where it is resumed.
        steps: whose passes are tried, where steps differ in what they run.

    Raises:
        RuntimeError: if not even two images fit, or the batch cannot be halved.
    """
    if not config.find_batch_size:
        return config
    found = None if checkpoints is None else checkpoints.newest(say=False)
    if checkpoints is not None and found is not None:
        facts = checkpoints.facts(found)
        if config.batch_size < facts["batch_size"]:
            return config
        return replace(config, batch_size=facts["batch_size"], accumulate=facts["accumulate"])
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # other kernels want other workspaces
    size = _largest(accelerator, model, backward, images, config, steps)
    size = Agreement(accelerator).smallest(size)
    if size < config.batch_size:
        log.info(
            "batches of %d images do not fit: %d, and %d of them in a step of the optimizer",
            config.batch_size,
            size,
            config.accumulate * config.batch_size // size,
        )
    return replace(config, batch_size=size, accumulate=config.accumulate * config.batch_size // size)


def _largest(
    accelerator: Accelerator,
    model: nn.Module,
    backward: Backward,
    images: Tensor,
    config: TrainConfig,
    steps: Sequence[int],
) -> int:
    size = config.batch_size

    def halved() -> int:
        nonlocal size
        if size % 2 or size // 2 < LEAST:
            raise RuntimeError(f"train.find_batch_size: no batch fits, the last one tried had {size} images")
        size //= 2
        return size

    @find_executable_batch_size(starting_batch_size=size, reduce_batch_size_fn=halved)
    def attempt(batch_size: int) -> int:
        batch = _batch_of(images, batch_size)
        batch = channels_last(batch) if config.channels_last else batch
        for step in steps:
            _try(accelerator, model, backward, batch, batch_size, step)
        return batch_size

    return attempt()


def _batch_of(images: Tensor, batch_size: int) -> Tensor:
    axis = images.ndim - 4
    return images.index_select(axis, torch.arange(batch_size, device=images.device) % images.shape[axis])


def _try(
    accelerator: Accelerator, model: nn.Module, backward: Backward, images: Tensor, batch_size: int, step: int
) -> None:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        reserve = [torch.empty_like(parameter) for parameter in trained for _ in range(RESERVE)]
        with repeatable(images.device), alone(), accelerator.autocast():  # another process may try fewer batches
            labels = torch.zeros(batch_size, dtype=torch.long, device=images.device)
            backward(accelerator, model, images, labels, step)
        del reserve
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
