"""What a run is made of: one frozen dataclass for each part, checked when it is made.

Recipes in `configs/` state what differs from these defaults; each field can be set on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from distill.data import DataConfig
from models.dynamics import NeuronConfig


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

    def __post_init__(self) -> None:
        _check(self.seed >= 0, "seed", self.seed, "at least 0")
        _check(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1, or none")
        _check(bool(self.name) and "/" not in self.name, "name", self.name, "a folder's name without '/'")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The analogue network that teaches. Without `pretrained` or `weights` it is trained on the spot."""

    name: str = "resnet18"
    """timm's name of the network, or hf_hub:owner/model."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the timm network, e.g. {channels: [32, 64, 128, 256]}."""
    cifar_stem: bool = False
    """Replace the stem by a 3x3 convolution of stride 1 without max pool, for images of about 32x32 pixels."""
    pretrained: bool = False
    """Load timm's weights, from the hub or its cache."""
    weights: str | None = None
    """A safetensors file, or a folder that holds model.safetensors, with the teacher's weights."""
    input_size: list[int] | None = None
    """Images as [channels, height, width]; None: what the pretrained weights came with."""
    mean: list[float] | None = None
    """Mean of each channel that the teacher was trained with, for values in [0, 1]; None: see input_size."""
    std: list[float] | None = None
    """Standard deviation of each channel, likewise."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
    """How images are resized; None: as the pretrained weights came with, else bilinear."""
    crop_pct: float | None = None
    """Share of the image that the centre crop of evaluation keeps; None: see interpolation, else 1."""

    def __post_init__(self) -> None:
        _check(not (self.pretrained and self.weights), "weights", self.weights, "none with pretrained")
        if self.input_size is not None:
            good = len(self.input_size) == 3 and min(self.input_size) > 0
            _check(good, "input_size", self.input_size, "[channels, height, width], each above 0")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and self.input_size is not None:
                channels = self.input_size[0]
                _check(len(values) == channels, name, values, f"{channels} numbers, one a channel")
        if self.std is not None:
            _check(min(self.std) > 0, "std", self.std, "above 0")
        if self.crop_pct is not None:
            _check(0 < self.crop_pct <= 1, "crop_pct", self.crop_pct, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The spiking network that learns."""

    name: str = "twin"
    """twin: the teacher's own module tree with neurons; or a network of models.list_snns()."""
    timesteps: int = 4
    """T, time steps of one image, at least 1."""
    neuron: NeuronConfig = field(default_factory=NeuronConfig)
    """The neurons' constants."""
    init: Literal["teacher", "scratch"] = "teacher"
    """Where a twin's weights start: copied from the teacher, or drawn anew."""
    algorithm: str = "rate_m"
    """The gradient: rate_m (rate-based backpropagation) or bptt (through time)."""
    gates: Literal["refuse", "keep"] = "refuse"
    """Gates such as squeeze-and-excitation: refuse them, or keep them analogue, computed on the rate."""

    def __post_init__(self) -> None:
        from models import ALGORITHMS, list_snns

        _check(self.timesteps >= 1, "timesteps", self.timesteps, "at least 1")
        _check(self.algorithm in ALGORITHMS, "algorithm", self.algorithm, f"one of {ALGORITHMS}")
        names = ["twin", *list_snns()]
        _check(self.name in names, "name", self.name, f"one of {names}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the parts of the loss; each part is a mean over images, in nats per image."""

    student_ce: float = 1.0
    """Cross-entropy of the student's logits with the labels."""
    student_kd: float = 1.0
    """KL divergence of the student's from the teacher's softened logits."""
    hybrid_ce: float = 1.0
    """Cross-entropy of each hybrid's logits, mean over the taps."""
    hybrid_kd: float = 1.0
    """KL divergence of each hybrid's logits, mean over the taps."""
    temperature: float = 2.0
    """Softens the logits of both KL terms, which are multiplied by its square; above 0."""

    def __post_init__(self) -> None:
        for name in ("student_ce", "student_kd", "hybrid_ce", "hybrid_kd"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _check(self.temperature > 0, "temperature", self.temperature, "above 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a network is trained. A step is one update of the optimizer, on all processes together."""

    epochs: int = 10
    """Passes over the training images, at least 1."""
    batch_size: int = 128
    """Images of one forward pass on one process."""
    accumulate: int = 1
    """Forward passes of one optimizer step."""
    optimizer: str = "sgd"
    """timm's name of the optimizer: sgd (Nesterov momentum), adamw, lamb, ..."""
    lr: float = 0.1
    """Learning rate at the end of the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    momentum: float = 0.9
    """Momentum of optimizers that have one."""
    weight_decay: float = 5e-4
    """Not applied to biases and norms."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises linearly from 0."""
    clip: float | None = None
    """Largest norm of all gradients together; None for no clipping."""
    label_smoothing: float = 0.0
    """Of the cross-entropy, when an analogue teacher is trained; in [0, 1)."""
    channels_last: bool = True
    """Keep images and weights in the memory format that convolutions are fastest in."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("min_lr", "momentum", "weight_decay", "warmup_steps"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _check(self.lr > 0, "lr", self.lr, "above 0")
        _check(self.clip is None or self.clip > 0, "clip", self.clip, "above 0, or none")
        _check(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distils a timm teacher into a spiking network by block-wise hybrid replacement."""

    run: RunConfig = field(default_factory=RunConfig)
    """Folder, seed and trackers."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The analogue network that teaches."""
    teacher_train: TrainConfig = field(default_factory=TrainConfig)
    """How the teacher is trained where it comes without weights."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The spiking network that learns."""
    taps: list[str] | None = None
    """Teacher modules at which blocks are swapped; None: its feature_info without stem and last entry."""
    student_taps: dict[str, str] | None = None
    """The student's module of a tap where it has another name, e.g. {stages.0: layer1}; None: the same names."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the parts of the loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the student is trained."""
    eval_timesteps: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Time steps at which the trained student is evaluated, besides its own."""

    def __post_init__(self) -> None:
        good = all(steps >= 1 for steps in self.eval_timesteps)
        _check(good, "eval_timesteps", self.eval_timesteps, "at least 1 each")


@dataclass(frozen=True, kw_only=True)
class TeacherTrainingConfig:
    """Trains an analogue timm network, to be a teacher."""

    run: RunConfig = field(default_factory=lambda: RunConfig(name="teacher"))
    """Folder, seed and trackers."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The network; `pretrained` and `weights` are where it starts."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it is trained."""


def _check(good: bool, name: str, value: Any, allowed: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {allowed}, found {value!r}")
