"""The training loop, the same for every network: steps, epochs, checkpoints, metrics.

A step is one update of the optimizer. Losses are means over images.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from distill.backward import Backward
from distill.config import TrainConfig
from distill.mixing import Mixing
from distill.runs import Checkpoints, RunFolder

CHECK_EVERY = 25
"""Forward passes between two looks at the loss, each of which waits for the device."""


class NonFiniteLossError(RuntimeError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class FitResult:
    """A trained model and what its training cost, the epochs before an interruption included."""

    model: nn.Module
    """The wrapped model, still prepared, in evaluation mode."""
    evaluation: Mapping[str, float] | None
    """What `evaluate` said after the last epoch; None where a resumed training had no epoch left."""
    seconds: float
    """Of training steps; on the main process."""
    images: int
    """That were trained on in that time, all processes together; on the main process."""


def fit(
    *,
    stage: str,
    accelerator: Accelerator,
    model: nn.Module,
    backward: Backward,
    loader: DataLoader,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    config: TrainConfig,
    folder: RunFolder,
    resume: bool,
    mixing: Mixing | None = None,
    epochs_before: int = 0,
    lr_epochs: int | None = None,
    unused_parameters: bool = False,
) -> FitResult:
    """Trains a model, from the newest checkpoint of the stage if `resume` finds one.

    Args:
        stage: names the checkpoints and the metrics: "teacher", "student", ...
        backward: the forward and backward passes of one batch; returns scalars by name, "total" for the loss.
        loader: training batches (images, labels), not prepared.
        evaluate: called with the wrapped model in evaluation mode after each epoch; its numbers are logged.
        mixing: mixes images and labels of each batch.
        epochs_before: epochs of earlier trainings on the same data: order, augmentation, mixing and the number of the
            step go on from there.
        lr_epochs: epochs of the trainings that share one learning rate curve, those before included; None for a curve
            of this training's own.
        unused_parameters: whether there are steps in which some parameters have no part, which DDP must be told.

    Raises:
        ValueError: for fewer images than the processes need for one batch each.
        NonFiniteLossError: names the parts of the loss; the last checkpoint stays as it was.
    """
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config)
    accelerator.gradient_accumulation_steps = config.accumulate
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if len(loader) == 0:
        raise ValueError(
            "there are fewer training images than the batches of all processes together take "
            f"({accelerator.num_processes} x batch_size {config.batch_size})"
        )
    steps_per_epoch = math.ceil(len(loader) / config.accumulate)
    factor = warmup_cosine(config, (lr_epochs or config.epochs) * steps_per_epoch)
    before = epochs_before if lr_epochs is not None else 0
    scheduler = accelerator.prepare(LambdaLR(optimizer.optimizer, lambda step: factor(step + before * steps_per_epoch)))
    checkpoints = Checkpoints(folder, stage)
    first = _resume(accelerator, checkpoints, folder, stage) if resume else 0
    evaluation = None
    for epoch in range(first, config.epochs):
        loader.set_epoch(epochs_before + epoch)  # type: ignore[attr-defined]  # Accelerate's loader
        started = time.perf_counter()
        lr = scheduler.get_last_lr()[0]
        means, count = _train_epoch(
            accelerator, model, backward, loader, optimizer, scheduler, config, stage, epoch, mixing, epochs_before
        )
        seconds = time.perf_counter() - started
        evaluation = evaluate(model.eval())
        metrics = {
            "stage": stage,
            "epoch": epoch + 1,
            "steps": (epoch + 1) * steps_per_epoch,
            "lr": lr,
            **{f"loss/{name}": value for name, value in means.items()},
            **evaluation,
            "images": count,
            "train_seconds": seconds,
            "images_per_second": count / seconds,
            "seconds": time.perf_counter() - started,
        }
        if accelerator.is_main_process:
            folder.append_metrics(metrics)
        numbers = {f"{stage}/{name}": value for name, value in metrics.items() if name not in ("stage", "epoch")}
        # trackers want steps that rise over all stages: the lines of the metrics so far; the main process alone tracks
        accelerator.log(numbers, step=len(folder.metrics()))
        checkpoints.save(
            epoch + 1,
            lambda path: accelerator.save_state(str(path)),
            accelerator.is_main_process,
            accelerator.wait_for_everyone,
        )
    epochs = [line for line in folder.metrics() if line["stage"] == stage]
    seconds, images = (sum(line[name] for line in epochs) for name in ("train_seconds", "images"))
    return FitResult(model.eval(), evaluation, seconds, images)


def unwrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The network that was prepared, without what Accelerate put around it; its `forward` is its class's again."""
    network = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(network).pop("forward", None)  # Accelerate leaves the bound method on the instance
    return network


def channels_last(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in the memory format that convolutions are fastest in; with a time axis as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def _train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    backward: Backward,
    loader: DataLoader,
    optimizer: Any,
    scheduler: Any,
    config: TrainConfig,
    stage: str,
    epoch: int,
    mixing: Mixing | None,
    epochs_before: int,
) -> tuple[dict[str, float], int]:
    """One pass over the data; returns the mean of each part of the loss and the number of images."""
    model.train()
    sums = _Sums()
    count = 0
    title = f"{stage} {epoch + 1}/{config.epochs}"
    bar = tqdm(loader, title, disable=not accelerator.is_local_main_process, leave=False, mininterval=1.0)
    past = epochs_before + epoch
    steps_before = past * math.ceil(len(loader) / config.accumulate)
    for batch, (images, labels) in enumerate(bar):
        if config.channels_last:
            images = channels_last(images)
        count += len(labels)
        if mixing is not None and mixing.enabled:
            images, labels = mixing(images, labels, past * len(loader) + batch, accelerator.process_index)
        with accelerator.accumulate(model):
            parts = backward(accelerator, model, images, labels, steps_before + batch // config.accumulate)
            if accelerator.sync_gradients and config.clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()
        sums.add(parts, len(labels))
        if batch % CHECK_EVERY == 0:
            total = _checked(sums.means(accelerator), stage, epoch, config)["total"]
            bar.set_postfix(loss=f"{total:.3f}", lr=f"{scheduler.get_last_lr()[0]:.2g}")
    images_of_all = accelerator.reduce(torch.tensor(float(count), device=accelerator.device), "sum")
    return _checked(sums.means(accelerator), stage, epoch, config), int(images_of_all.item())


class _Sums:
    """The parts of the loss, each summed over the images of the batches that had it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, parts: Mapping[str, Tensor], images: int) -> None:
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.float() * images  # type: ignore[operator]
            self._counts[name] = self._counts.get(name, 0) + images

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the images of all processes, which have all had the same parts."""
        counts = torch.tensor([float(self._counts[name]) for name in self._sums], device=accelerator.device)
        sums, counts = accelerator.reduce(torch.stack([torch.stack([*self._sums.values()]), counts]), "sum").cpu()
        return dict(zip(self._sums, (sums / counts).tolist(), strict=True))


def _checked(means: dict[str, float], stage: str, epoch: int, config: TrainConfig) -> dict[str, float]:
    """The same, if all are numbers; all processes find out at once, because all have the same means."""
    if not all(math.isfinite(value) for value in means.values()):
        parts = ", ".join(f"{name} {value:g}" for name, value in means.items())
        raise NonFiniteLossError(
            f"the loss is no finite number any more in epoch {epoch + 1} of the {stage} ({parts}). Checkpoints of "
            f"earlier epochs are kept; lower train.lr ({config.lr}) or set train.clip (now {config.clip})"
        )
    return means


def _resume(accelerator: Accelerator, checkpoints: Checkpoints, folder: RunFolder, stage: str) -> int:
    """Loads the newest checkpoint; returns the number of finished epochs."""
    latest = checkpoints.latest()
    epochs = 0 if latest is None else latest[0]
    if accelerator.is_main_process:
        folder.drop_metrics(lambda line: line["stage"] != stage or line["epoch"] <= epochs)
    if latest is not None:
        accelerator.load_state(str(latest[1]))
    return epochs


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
