"""Networks and images as the hardware wants them, for a training and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from distill.data.image_set import ImageSet
from distill.data.loaders import prepare_loader, train_loader
from distill.optimizers import make_optimizer
from distill.train_config import TrainConfig
from models import FeedbackLoop


class Prepared(NamedTuple):
    """What a training works with."""

    network: nn.Module
    """As it was given, in the memory format that is wanted."""
    model: nn.Module
    """The same, wrapped for its devices."""
    optimizer: Any
    """Accelerate's, around a `torch.optim.Optimizer`."""
    loader: Any
    """Accelerate's, around the training batches."""
    steps_per_epoch: int
    """Of the optimizer; batches that fill no last step do not count."""


def prepare_training(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, config: TrainConfig, unused_parameters: bool
) -> Prepared:
    """
    Args:
        loader: training batches, not prepared.
        unused_parameters: whether there are steps in which some parameters have no part, which DDP must be told.

    Raises:
        ValueError: for fewer images than the processes need for one step.
    """
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    accelerator.gradient_accumulation_steps = config.accumulate
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)
    # before each forward pass DDP would put the main process's buffers in the place of what each has found
    own = [f"{path}.excess".lstrip(".") for path, module in model.named_modules() if isinstance(module, FeedbackLoop)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    prepared = prepare_loader(accelerator, loader)
    return Prepared(model, wrapped, optimizer, prepared, steps_per_epoch(accelerator, loader, config))


def check_training(
    accelerator: Accelerator, model: nn.Module, data: ImageSet, config: TrainConfig, seed: int, workers: int | None
) -> None:
    """Makes what a training starts with, once, before anything is written or trained for hours.

    Args:
        data: the images to train on.

    Raises:
        ValueError: for an unknown optimizer, or fewer images than a batch or than one step of all processes takes.
    """
    make_optimizer(model, config)
    steps_per_epoch(accelerator, train_loader(data, config.batch_size, seed=seed, workers=workers), config)


def steps_per_epoch(accelerator: Accelerator, loader: DataLoader, config: TrainConfig) -> int:
    """Of the optimizer; batches that fill no last step of all processes do not count.

    Args:
        loader: training batches, not prepared.

    Raises:
        ValueError: for fewer images than the processes need for one step.
    """
    found = len(loader) // accelerator.num_processes // config.accumulate
    if found == 0:
        passes = f" x accumulate {config.accumulate}" if config.accumulate > 1 else ""
        raise ValueError(
            "there are fewer training images than one step of all processes together takes "
            f"({accelerator.num_processes} x batch_size {config.batch_size}{passes})"
        )
    return found


def share_norms(network: nn.Module) -> None:
    """Gives every process the main process's running statistics: batch norms that do not synchronise have their own."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for buffer in module.buffers(recurse=False):
                broadcast(buffer)


def freeze_norms(network: nn.Module) -> None:
    """Lets batch norms take their running statistics, and keep them, until the next `network.train()`."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = False


def unwrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The network that was prepared, without what Accelerate put around it or left on it: it can be prepared again."""
    network = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    # a `forward` with autocast, and a mark for which it would not be given one again
    for left in ("forward", "_is_accelerate_prepared"):
        vars(network).pop(left, None)
    return network


def channels_last(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in the memory format that convolutions are fastest in; with a time axis as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images
