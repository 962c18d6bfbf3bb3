"""The optimizer and its learning rate over the steps of a training."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from distill.train_config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """timm's optimizer by name, without weight decay on biases and norms.

    Raises:
        ValueError: for a name that timm does not know, or settings that the optimizer refuses.
    """
    name = config.optimizer
    if name.lower() not in list_optimizers():
        close = difflib.get_close_matches(name, list_optimizers(), n=3) or list_optimizers()
        raise ValueError(f"optimizer: timm knows no {name!r}; close to it: {close}")
    if name.lower() == "sgd" and config.momentum == 0:
        name = "momentum"  # timm's name of SGD without Nesterov's step, which needs a momentum
    try:
        return create_optimizer_v2(
            model,
            opt=name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            filter_bias_and_bn=True,
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(f"optimizer: {name!r} refuses these settings: {error}") from error


def warmup_cosine(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step as a share of `config.lr`: linear from 0, then half a cosine.

    Args:
        steps: optimizer steps of the whole training; the cosine reaches `config.min_lr` after the last of them.
    """
    floor = config.min_lr / config.lr
    warmup = min(config.warmup_steps, steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, steps - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
