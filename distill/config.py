"""What a run is made of: one frozen dataclass for each part, checked when it is made.

Recipes in `configs/` state what differs from these defaults; each field can be set on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distill.adapters import AdapterForm
from distill.checks import check
from distill.data import DataConfig
from distill.data.event_config import is_events
from distill.network_config import InitConfig, StudentConfig, TeacherConfig
from distill.schedule_config import ScheduleConfig
from distill.snn_losses import SnnLossConfig
from distill.train_config import LossConfig, RunConfig, TrainConfig
from models import ALGORITHMS, ONLINE, PER_STEP


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
    init: InitConfig = field(default_factory=InitConfig)
    """Where it starts, if not where student.init says."""
    taps: list[str] | Literal["stages", "blocks"] = "stages"
    """Where blocks are swapped: stages (the ends of the teacher's stages but the last), blocks (of every block but the
    last), or names of the teacher's modules; an empty list for none, which is plain logit distillation."""
    student_taps: dict[str, str] | None = None
    """The student's module of a tap, e.g. {stages.0: layer1}; others are found: the same name, or the same stage."""
    adapter: AdapterForm = "conv1x1"
    """What makes a teacher's feature of a student's rates, in front of a batch norm and the teacher's activation:
    conv1x1, conv3x3, or norm: nothing, each channel by itself, where student and teacher have the same channels."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """When which hybrid trains."""
    save_hybrids: bool = True
    """Keep each hybrid in the run's folder, as a network of its own."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the parts of the loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the student is trained."""
    eval_timesteps: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Time steps at which the trained student is evaluated, besides its own."""

    def __post_init__(self) -> None:
        offline = tuple(name for name in ALGORITHMS if name not in ONLINE)
        found = self.student.algorithm
        if isinstance(self.taps, str):
            check(self.taps in ("stages", "blocks"), "taps", self.taps, "stages, blocks or a list of modules")
        allowed = f"one of {offline} in distillation (a backward pass each step: train it with scripts/train_snn.py)"
        check(found not in ONLINE, "student.algorithm", found, allowed)
        smoothing = self.train.label_smoothing
        check(smoothing == 0, "train.label_smoothing", smoothing, "0 in distillation, which has loss.label_smoothing")
        _check_evaluation(self.eval_timesteps)
        _check_encoder(self.student, self.data)
        _check_events(self.data, self.student, self.train)


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


@dataclass(frozen=True, kw_only=True)
class SnnTrainingConfig:
    """Trains a spiking network on labels alone, without a teacher."""

    run: RunConfig = field(default_factory=lambda: RunConfig(name="snn"))
    """Folder, seed and trackers."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    ann: TeacherConfig = field(default_factory=TeacherConfig)
    """The timm network whose twin is trained; and, for every network, how images are sized and normalised. A twin
    starts from its weights, where it has any."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The spiking network that learns."""
    init: InitConfig = field(default_factory=InitConfig)
    """Where it starts, if not where student.init says."""
    loss: SnnLossConfig = field(default_factory=SnnLossConfig)
    """The loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the network is trained."""
    eval_timesteps: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Time steps at which the trained network is evaluated, besides its own."""

    def __post_init__(self) -> None:
        student, smoothing = self.student, self.train.label_smoothing
        allowed = f"ce with {student.algorithm}, whose gradient is that of the mean logits alone (tet takes {PER_STEP})"
        check(self.loss.name != "tet" or student.algorithm in PER_STEP, "loss.name", self.loss.name, allowed)
        allowed = "0 for a spiking network, which has loss.label_smoothing"
        check(smoothing == 0, "train.label_smoothing", smoothing, allowed)
        allowed = f"none with {student.name}: only a twin starts from them (init.from_run takes another run's network)"
        check(self.ann.weights is None or student.name == "twin", "ann.weights", self.ann.weights, allowed)
        start, weights = student.init, self.ann.weights or self.ann.pretrained
        allowed = (
            "teacher or scratch without ann.weights or ann.pretrained: a fresh network has nothing to calibrate on"
        )
        check(start != "calibrated" or bool(weights), "student.init", start, allowed)
        _check_evaluation(self.eval_timesteps)
        _check_encoder(student, self.data)
        _check_events(self.data, student, self.train)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluates a student or a hybrid that a run has left."""

    model: str
    """Folder of the network: runs/NAME/student, runs/NAME/hybrids/TAP, or any that models.save_snn wrote."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images; their size and normalisation are the network's. Those to train on are read for recalibrate alone."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """With pretrained or weights: the network's predictions are compared with this one's, too. It sees the network's
    images: what is stated of its own, or came with its weights, must be the same."""
    timesteps: list[int] = field(default_factory=list)
    """Numbers of time steps to evaluate at, besides the network's own, e.g. 1,2,4,8."""
    recalibrate: bool = False
    """Estimate batch-norm statistics anew at each of these T, on training images, for this evaluation alone."""
    recalibration_images: int = 1024
    """How many training images that takes, rounded up to whole batches."""
    exit_thresholds: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.9, 0.95, 0.99])
    """Early exit at the largest T: an image stops at the first step at which the largest less the second largest
    probability of the mean logits so far reaches a threshold, in (0, 1]; an empty list leaves it out."""
    batch_size: int = 128
    """Images of one forward pass on one process."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Type of the autocast; None: what `accelerate launch` was told."""
    compile: bool = False
    """Fuse the passes over spike streams with torch.compile: worth its minute on many images."""
    threads: int | None = None
    """CPU threads of each process; None: all cores, shared by the processes."""
    out: str | None = None
    """A JSON file for the figures."""
    csv: str | None = None
    """A CSV file for the figures, in the columns of timm's results and some more, a row for each T."""

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        images, thresholds = self.recalibration_images, self.exit_thresholds
        check(images >= 1, "recalibration_images", images, "at least 1")
        check(all(0 < t <= 1 for t in thresholds), "exit_thresholds", thresholds, "in (0, 1] each")
        check(all(steps >= 1 for steps in self.timesteps), "timesteps", self.timesteps, "at least 1 each")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Writes report.html of a run anew."""

    run: str
    """Folder of the run; it need not have ended."""


def _check_evaluation(timesteps: list[int]) -> None:
    check(all(steps >= 1 for steps in timesteps), "eval_timesteps", timesteps, "at least 1 each")


def _check_encoder(student: StudentConfig, data: DataConfig) -> None:
    good = student.encoder != "poisson" or data.random_erasing == 0
    check(good, "data.random_erasing", data.random_erasing, "0 with student.encoder=poisson: noise is no probability")
    good = student.encoder != "poisson" or student.init != "calibrated"
    check(
        good,
        "student.encoder",
        student.encoder,
        "direct with student.init=calibrated, which no drawn input has part in",
    )


def _check_events(data: DataConfig, student: StudentConfig, train: TrainConfig) -> None:
    if not is_events(data):
        return
    check(student.encoder == "direct", "student.encoder", student.encoder, "direct with event data, which are spikes")
    allowed = "teacher or scratch with event data: the teacher's activations are those of the sum over time"
    check(student.init != "calibrated", "student.init", student.init, allowed)
    for name in ("mixup", "cutmix"):
        check(getattr(train, name) == 0, f"train.{name}", getattr(train, name), "0 with event frames")
