"""A linear network, its images and a training of it: what the tests of the loop share."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_runs import forget_accelerate

from distill import TrainConfig
from distill.backward import once
from distill.data.loaders import EpochSampler
from distill.loop import fit
from distill.runs import RunFolder

IMAGES = 8
HALF_COSINE = [1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0.0]  # at 0, 1/4, 1/2, 3/4 and 1 of the way


def config_of(**changes):
    defaults = dict(epochs=1, batch_size=4, optimizer="momentum", lr=0.1, momentum=0.0, weight_decay=0.0)
    return TrainConfig(**{**defaults, **changes})


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()


def data_of(images=IMAGES):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 1, 2, 2, generator=generator, dtype=torch.float64)
    return TensorDataset(pixels, torch.randint(0, 3, (images,), generator=generator))


class Keyed(TensorDataset):
    """Indexed by what `EpochSampler` yields."""

    def __getitem__(self, key):
        return super().__getitem__(key[1])


class InOrder(EpochSampler):
    """The images of each epoch in their own order."""

    def order(self, epoch):
        return np.arange(len(self))


def loader_of(batch_size, images, sampler, **options):
    """With a generator of its own, as `distill.data.train_loader` makes it: a pass draws a seed for its workers."""
    data = Keyed(*data_of(images).tensors)
    return DataLoader(data, batch_size, sampler=sampler, generator=torch.Generator(), **options)


def in_order(batch_size, images=IMAGES):
    return loader_of(batch_size, images, InOrder(images, 0))


def shuffled(batch_size, images):
    return loader_of(batch_size, images, EpochSampler(images, 3), drop_last=True)


def cross_entropy(logits, labels):
    return {"total": F.cross_entropy(logits, labels)}


class Stopped(Exception):
    """Raised by a test in the middle of a training."""


class Cut:
    """A loss that stops the training when so many forward passes are behind it."""

    def __init__(self, passes):
        self.left = passes

    def __call__(self, logits, labels):
        if self.left == 0:
            raise Stopped
        self.left -= 1
        return cross_entropy(logits, labels)


def train(tmp_path, config, model=None, losses=cross_entropy, images=IMAGES, resume=False, evaluate=lambda model: {},
          score=None, saving=None, stop_after=None, loader=None, scaler=None):  # fmt: skip
    """Returns the trained network and what `fit` returned; with `stop_after` the network after so many epochs."""
    forget_accelerate()
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    accelerator.scaler = scaler
    tmp_path.mkdir(exist_ok=True)
    model = linear() if model is None else model
    if stop_after is not None:
        epochs = itertools.count(1)

        def evaluate(model):
            if next(epochs) == stop_after:
                raise Stopped
            return {}

        with pytest.raises(Stopped):
            train(tmp_path, config, model, losses, images, resume, evaluate, score, saving, loader=loader)
        return model, None
    result = fit(
        stage="student",
        accelerator=accelerator,
        model=model,
        backward=once(losses),
        loader=in_order(config.batch_size, images) if loader is None else loader,
        evaluate=evaluate,
        config=config,
        folder=RunFolder(tmp_path, saving),
        resume=resume,
        score=score,
    )
    return accelerator.unwrap_model(result.model), result
