"""How any network is trained, and what a run is: folder, steps, optimizer, losses of distillation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from distill.checks import check


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run is kept and what makes it repeatable."""

    name: str = "run"
    """The run's folder is runs/NAME; a taken name gets the next free suffix (-2, -3, ...)."""
    dir: str | None = None
    """The run's folder, instead of runs/NAME."""
    seed: int = 0
    """Fixes weights, data order and augmentation, at least 0."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Accelerate's trackers by name (tensorboard, wandb, ...); an empty list for none."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Type of the autocast; None: what `accelerate launch` was told."""
    compile: bool = True
    """Fuse the passes over spike streams with torch.compile: a minute at the start, then several times as fast."""
    threads: int | None = None
    """CPU threads of each process, when training on the CPU; None: all cores, shared by the processes."""
    save_every: str | None = "15 min"
    """Time or optimizer steps between two checkpoints, e.g. 15 min or 500 steps, besides the one after each epoch;
    None: only those."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints of a stage are kept, at least 1, besides the one with the best accuracy."""

    def __post_init__(self) -> None:
        if self.save_every is not None:
            save_every(self.save_every)
        check(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, "at least 1")
        check(self.seed >= 0, "seed", self.seed, "at least 0")
        check(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1, or none")
        inside = self.name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(self.name)
        check(inside, "name", self.name, "a folder's name, without / or \\")


def save_every(text: str) -> dict[str, float]:
    """ "15 min" as {"minutes": 15.0}, "500 steps" as {"steps": 500}."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?min|([1-9]\d*) ?steps", text)
    check(match is not None and float(match[1] or 1) > 0, "save_every", text, "such as 15 min or 500 steps, or none")
    assert match is not None
    return {"minutes": float(match[1])} if match[1] else {"steps": int(match[2])}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the parts of the loss; each part is a mean over images, in nats per image."""

    student_ce: float = 1.0
    """Cross-entropy of the student's logits with the labels."""
    student_kd: float = 1.0
    """KL divergence of the student's from the teacher's softened logits."""
    hybrid_ce: float = 1.0
    """Cross-entropy of each hybrid's logits, mean over the active taps."""
    hybrid_kd: float = 1.0
    """KL divergence of each hybrid's logits, mean over the active taps."""
    hybrid_feature: float = 1.0
    """Feature alignment of the adapted rates, mean over the active taps; no effect where feature is none."""
    feature: Literal["none", "mse", "cosine"] = "none"
    """How far an adapted rate is from the teacher's feature: mean square of the difference, or 1 - cosine over the
    channels, mean over places; none leaves it out."""
    tap_weights: dict[str, float] = field(default_factory=dict)
    """Weight of a tap in those means, by its name, at least 0; taps without an entry have 1. A mean is the weighted sum
    over the number of active taps: the weights are not normalised."""
    temperature: float = 2.0
    """Softens the logits of both KL terms, which are multiplied by its square; above 0."""
    label_smoothing: float = 0.0
    """Of the cross-entropies of student and hybrids, in [0, 1)."""

    def __post_init__(self) -> None:
        for name in ("student_ce", "student_kd", "hybrid_ce", "hybrid_kd", "hybrid_feature"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        check(self.feature in ("none", "mse", "cosine"), "feature", self.feature, "none, mse or cosine")
        for tap, weight in self.tap_weights.items():
            check(weight >= 0, f"tap_weights.{tap}", weight, "at least 0")
        check(self.temperature > 0, "temperature", self.temperature, "above 0")
        check(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a network is trained. A step is one update of the optimizer, on all processes together."""

    epochs: int = 10
    """Passes over the training images, at least 1."""
    batch_size: int = 128
    """Images of one forward pass on one process."""
    accumulate: int = 1
    """Forward passes of one optimizer step."""
    find_batch_size: bool = False
    """Halve batch_size, and double accumulate, until a batch fits the device's memory."""
    optimizer: str = "sgd"
    """timm's name of the optimizer: sgd (Nesterov momentum), adamw, lamb, ..."""
    lr: float = 0.1
    """Learning rate at the end of the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine, at most lr."""
    momentum: float = 0.9
    """Momentum of optimizers that have one."""
    weight_decay: float = 5e-4
    """Not applied to biases and norms."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises linearly from 0."""
    clip: float | None = None
    """Largest norm of all gradients together; None for no clipping."""
    ema: float | None = None
    """Decay of a moving average of the weights, in (0, 1), which is then evaluated and kept in their place; None: no
    average. Over the first steps the decay is smaller."""
    sync_bn: bool = True
    """Batch-norm statistics over the images of all processes; false: over each process's own."""
    freeze_norms: bool = False
    """Batch norms of the network keep their running statistics, as where it was calibrated; adapters' do not."""
    max_skipped_steps: int = 3
    """Steps in a row whose loss or gradient is no finite number that are skipped and logged; one more ends the run."""
    label_smoothing: float = 0.0
    """Of the cross-entropy, when an analogue network is trained; in [0, 1)."""
    mixup: float = 0.0
    """Alpha of the Beta distribution that mixup draws its shares from, at least 0; 0 for no mixup."""
    cutmix: float = 0.0
    """Alpha of the Beta distribution that CutMix draws the size of its box from, at least 0; 0 for no CutMix."""
    mixup_prob: float = 1.0
    """Share of the batches that are mixed, by mixup or CutMix, in [0, 1]."""
    mixup_switch_prob: float = 0.5
    """Share of the mixed batches that CutMix mixes, where both are on, in [0, 1]."""
    grad_checkpointing: bool = False
    """Trade time for memory: of each block its input alone is kept, and it runs again in the backward pass. A spiking
    network (rate_m, bptt, dsr) trains as without; an analogue one has timm's own, which moves running statistics twice
    a step."""
    cuda_graphs: bool = True
    """Launch a pass's kernels as one CUDA graph: several times as fast for small images. Of a single process with a
    GPU, accumulate 1 and no grad_checkpointing; all others train as without."""
    channels_last: bool = True
    """Keep images and weights in the memory format that convolutions are fastest in."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("min_lr", "momentum", "weight_decay", "warmup_steps", "max_skipped_steps"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        check(self.lr > 0, "lr", self.lr, "above 0")
        check(self.min_lr <= self.lr, "min_lr", self.min_lr, f"at most lr, {self.lr}")
        check(self.clip is None or self.clip > 0, "clip", self.clip, "above 0, or none")
        check(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "in (0, 1), or none")
        check(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        for name in ("mixup", "cutmix"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("mixup_prob", "mixup_switch_prob"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        mixes = self.mixup > 0 or self.cutmix > 0
        check(not mixes or self.batch_size % 2 == 0, "batch_size", self.batch_size, "even with mixup or cutmix")
