"""The networks of a run: the analogue one, the spiking one, and where the spiking one starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from distill.checks import check
from models import ALGORITHMS, TWIN_ALGORITHMS, list_snns
from models.dsr import DSRConfig
from models.dynamics import NeuronConfig
from models.feedback import FEEDBACK_ALGORITHMS, FeedbackConfig
from models.registry import FEEDBACK_NETWORKS


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
    """A safetensors file, or a folder that holds model.safetensors, with the teacher's weights. A folder that
    train_teacher.py wrote also says how its images are made: the fields below need not be set."""
    input_size: list[int] | None = None
    """Images as [channels, height, width]; None: what the weights came with. Event data: [2, height, width], to which
    frames are resized."""
    mean: list[float] | None = None
    """Mean of each channel that the teacher was trained with, for values in [0, 1]; None: see input_size. Event data:
    of a pixel's events in a whole recording; [0, 0] and a std of [1, 1] leave counts as they are."""
    std: list[float] | None = None
    """Standard deviation of each channel, likewise."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
    """How images are resized; None: as the weights came with, else bilinear."""
    crop_pct: float | None = None
    """Share of the image that the centre crop of evaluation keeps; None: see interpolation, else 1."""
    crop_mode: Literal["center", "squash", "border"] | None = None
    """What evaluation does with images of another aspect ratio. center: crop the longer side; squash: resize them to
    that of the input; border: keep all of them, with a border of the mean. None: see interpolation, else center."""
    min_top1: float | None = None
    """Accuracy in percent below which nothing is learned from it; None: what guessing hardly ever reaches; 0: any.
    In an evaluation, too, where None only warns."""

    def __post_init__(self) -> None:
        check(not (self.pretrained and self.weights), "weights", self.weights, "none with pretrained")
        if self.input_size is not None:
            good = len(self.input_size) == 3 and min(self.input_size) > 0
            check(good, "input_size", self.input_size, "[channels, height, width], each above 0")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and self.input_size is not None:
                channels = self.input_size[0]
                check(len(values) == channels, name, values, f"{channels} numbers, one a channel")
        if self.std is not None:
            check(min(self.std) > 0, "std", self.std, "above 0")
        if self.crop_pct is not None:
            check(0 < self.crop_pct <= 1, "crop_pct", self.crop_pct, "in (0, 1]")
        good = self.min_top1 is None or 0 <= self.min_top1 <= 100
        check(good, "min_top1", self.min_top1, "in [0, 100], or none")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The spiking network that learns."""

    name: str = "twin"
    """twin: the analogue network's own module tree with neurons; or a network of models.list_snns()."""
    width: int | None = None
    """Channels of the first stage of a network of models.list_snns(), all others in proportion; None: the paper's."""
    timesteps: int = 4
    """T, time steps of one image, at least 1."""
    neuron: NeuronConfig = field(default_factory=NeuronConfig)
    """The neurons' constants."""
    dsr: DSRConfig = field(default_factory=DSRConfig)
    """The neurons of the algorithm dsr, in place of those above."""
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    """The loop of a feedback network and its backward pass. The papers' neurons are neuron.leak 1, neuron.threshold 2.
    """
    encoder: Literal["direct", "poisson"] = "direct"
    """direct: the same image at each step; poisson: spikes, as likely as a pixel is bright, drawn anew at each step."""
    init: Literal["teacher", "calibrated", "scratch"] = "teacher"
    """Where the weights start. teacher: copied from the analogue network (by a network of models.list_snns() where
    shapes agree); calibrated: a twin's are scaled, too, so that firing rates stand for the analogue activations (the
    view of ANN-to-SNN conversion); scratch: drawn anew."""
    algorithm: str = "rate_m"
    """The gradient: rate_m (rate-based, all steps at once), rate_s (rate-based, a step at a time, in memory that does
    not grow with T), bptt (through time); for the networks of models.list_snns() also ottt and sltt (forward in time,
    a backward pass each step; not in distillation) and dsr (spike representation, with neurons of its own); for the
    feedback networks among them, and for no other, ide (implicit differentiation on the equilibrium of firing rates)
    and spide (the same by backward spikes)."""
    gates: Literal["refuse", "keep"] = "refuse"
    """Gates such as squeeze-and-excitation: refuse them, or keep them analogue, computed on the rate."""

    def __post_init__(self) -> None:
        names = ["twin", *list_snns()]
        check(self.name in names, "name", self.name, f"one of {names}")
        check(self.timesteps >= 1, "timesteps", self.timesteps, "at least 1")
        check(self.algorithm in ALGORITHMS, "algorithm", self.algorithm, f"one of {ALGORITHMS}")
        if self.name == "twin":
            allowed = f"one of {TWIN_ALGORITHMS} for a twin"
            check(self.algorithm in TWIN_ALGORITHMS, "algorithm", self.algorithm, allowed)
            check(self.width is None, "width", self.width, "none for a twin, which is as wide as its analogue network")
        else:
            check(self.init != "calibrated", "init", self.init, f"teacher or scratch for {self.name}, which is no twin")
        feedback = self.name in FEEDBACK_NETWORKS
        of_network = tuple(name for name in ALGORITHMS if (name in FEEDBACK_ALGORITHMS) == feedback)
        allowed = f"one of {of_network} for {self.name}, which has {'a' if feedback else 'no'} feedback loop"
        check(self.algorithm in of_network, "algorithm", self.algorithm, allowed)
        if feedback:
            why = f"for {self.name}: the averages of its neurons have to settle"
            check(self.neuron.reset == "soft", "neuron.reset", self.neuron.reset, f"soft {why}")
            learnable = self.neuron.learnable_leak
            check(not learnable, "neuron.learnable_leak", learnable, f"false {why}")
        check(self.width is None or self.width >= 1, "width", self.width, "at least 1, or none")
        unknowable = "refuse with rate_s, which at the first step does not know the rate of all steps that a gate needs"
        check(self.gates != "keep" or self.algorithm != "rate_s", "gates", self.gates, unknowable)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where the spiking network starts, if not where `student.init` says."""

    from_run: str | None = None
    """Folder of a finished run, whose student's weights are the start, also at another T or with another gradient."""
    calibration_images: int = 128
    """Training images on which the network is calibrated and adapters start, at least 1."""
    percentile: float | None = None
    """calibrated: the percentile of a layer's activations that a neuron firing in each step stands for, in (0, 100];
    None: for each channel the one with which its rates represent the activations best, also above its largest."""
    adapters: Literal["random", "regression"] = "random"
    """random: adapters start from random weights; regression: from the linear regression of the teacher's features on
    the student's rates, on `calibration_images` images (of a progressive stage: when it begins)."""

    def __post_init__(self) -> None:
        check(self.calibration_images >= 1, "calibration_images", self.calibration_images, "at least 1")
        good = self.percentile is None or 0 < self.percentile <= 100
        check(good, "percentile", self.percentile, "in (0, 100], or none")
