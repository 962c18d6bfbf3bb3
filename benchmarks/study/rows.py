"""The rows of the study: one list, from which runs, table and plots are made.

All rows of a scale have the same images, epochs, batch, augmentation and seeds (`common.yaml`, `SCALES`), and differ in
what their `arguments` say. The student is the spiking twin of the teacher, T = 4, unless a row says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

NETWORK = {
    "name": "resnet18",
    "cifar_stem": "true",
    "input_size": "[3, 32, 32]",
    "mean": "[0.4914, 0.4822, 0.4465]",
    "std": "[0.2470, 0.2435, 0.2616]",
}
"""The teacher but for its width."""


def network_of(width: int) -> dict[str, str]:
    """The section of the configuration that describes the analogue network.

    Args:
        width: channels of the first stage: 32 is `resnet18_w32_cifar10`, 64 timm's ResNet-18.
    """
    channels = ", ".join(str(width * 2**stage) for stage in range(4))
    return {**NETWORK, "kwargs": f"{{channels: [{channels}]}}"}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How long the rows of a table train, and how wide their networks are.

    Args:
        what: in words.
        arguments: of every row's script.
        width: channels of the teacher's first stage.
    """

    what: str
    arguments: dict[str, str]
    width: int = 32


def _wide(epochs: int) -> Scale:
    return Scale(
        what=f"{epochs} epochs of the 50,000 images in batches of 256, evaluated on all 10,000 test images, of a "
        "ResNet-18 of its full width; for a GPU",
        arguments={
            "train.epochs": f"{epochs}",
            "train.batch_size": "256",
            "train.lr": "0.04",
            "train.warmup_steps": "200",
        },
        width=64,
    )


SCALES = {
    "full": Scale(
        what="6 epochs of the 50,000 images, evaluated on all 10,000 test images",
        arguments={"train.epochs": "6", "train.lr": "0.02", "train.warmup_steps": "100"},
    ),
    "long": Scale(
        what="30 epochs of the 50,000 images, evaluated on all 10,000 test images; for a GPU",
        arguments={"train.epochs": "30", "train.lr": "0.02", "train.warmup_steps": "200"},
    ),
    "wide": _wide(30),
    "wide_60": _wide(60),
    "medium": Scale(
        what="2 epochs of the 50,000 images in batches of 32, evaluated on all 10,000 test images",
        arguments={"train.epochs": "2", "train.batch_size": "32", "train.lr": "0.001", "train.warmup_steps": "50"},
    ),
    "short": Scale(
        what="3 epochs of 10,240 images in batches of 32, evaluated on 2,000 test images",
        arguments={
            "train.epochs": "3",
            "train.batch_size": "32",
            "train.lr": "0.001",
            "train.warmup_steps": "50",
            "data.max_train_samples": "10240",
            "data.max_eval_samples": "2000",
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network of a table.

    Args:
        title: what it is called in the table.
        label: the same in a plot.
        script: of `scripts/`, without its ending; or "convert": no training (`benchmarks.study.conversion`).
        arguments: of the script, by name, besides those of the scale.
        at_scale: more of them, at one scale.
        teacher: whether the teacher's weights are read.
        seeds: how many runs there are, of seeds 0, 1, ...
    """

    title: str
    label: str
    script: str
    arguments: dict[str, str] = field(default_factory=dict)
    at_scale: dict[str, dict[str, str]] = field(default_factory=dict)
    teacher: bool = True
    seeds: int = 1

    @property
    def network(self) -> str:
        """The section of the configuration that describes the analogue network."""
        return "ann" if self.script == "train_snn" else "teacher"

    def said(self, scale: str) -> dict[str, str]:
        """The row's own arguments at a scale, which come after those of the scale."""
        return {**self.arguments, **self.at_scale.get(scale, {})}


NEURON = {"student.neuron.leak": "0.5", "student.neuron.detach_reset": "false"}
"""Of all students that train, or are calibrated."""
FRESH = {
    **{scale: {"train.lr": "0.1"} for scale in ("full", "long")},
    **{scale: {"train.lr": "0.2"} for scale in ("wide", "wide_60")},
    **{scale: {"train.lr": "0.03"} for scale in ("medium", "short")},
}
"""Weights that are drawn anew take steps, at each scale, that would ruin calibrated ones."""
CALIBRATED = {**NEURON, "student.init": "calibrated"}
TAUGHT = {**CALIBRATED, "train.freeze_norms": "true"}
"""A twin from the teacher's weights, trained as the network that it was calibrated as."""
DISTILLED = {**TAUGHT, "loss.student_ce": "0", "loss.hybrid_ce": "0", "loss.temperature": "4"}
"""On the teacher's logits alone, which ended no lower than with labels and agreed with the teacher more often."""
OF_THE_BATCH = {"train.freeze_norms": "false"}
LONGER = ("full", "long", "wide", "wide_60")
LARGE_STEPS = {scale: OF_THE_BATCH for scale in LONGER}
"""Where there is time for them: small ones, at the calibrated statistics, stand still from the third epoch on."""


def _soft(*labels: str) -> dict[str, dict[str, str]]:
    """At each scale: in short trainings larger steps than with labels, which did no harm; in long ones with labels."""
    longer = {**OF_THE_BATCH, **{name: "1" for name in labels}}
    return {
        **{scale: dict(longer) for scale in LONGER},
        **{scale: {"train.lr": "0.002"} for scale in ("medium", "short")},
    }


SOFT = _soft("loss.student_ce")
SOFT_HYBRIDS = _soft("loss.student_ce", "loss.hybrid_ce")
NO_TAPS = {"taps": "[]"}
WITH_TAPS = {**DISTILLED, "init.adapters": "regression"}
TWIN = {**NEURON, "student.name": "twin"}
BPTT = {**TWIN, "student.algorithm": "bptt"}

HYBRIDS = ("joint", "progressive", "stochastic")
"""The rows that train hybrids."""

AS_THEY_ARE = "teacher_weights-labels_init-teacher"
"""The ablation that starts from the teacher's weights without a calibration, on labels alone."""

BEST = "joint"
"""The one of `HYBRIDS` from which further rows and the ablations are derived."""

_TRAINED: dict[str, Row] = {
    "scratch": Row(
        title="rate_m from scratch",
        label="rate_m",
        script="train_snn",
        arguments=TWIN,
        at_scale=FRESH,
        teacher=False,
    ),
    "teacher_weights": Row(
        title="rate_m from the teacher's weights, calibrated, labels alone",
        label="teacher's weights",
        script="train_snn",
        arguments={**TAUGHT, "student.name": "twin"},
        at_scale=LARGE_STEPS,
        seeds=3,
    ),
    "kd": Row(
        title="from the teacher's weights, logit KD",
        label="logit KD",
        script="distill",
        arguments={**DISTILLED, **NO_TAPS},
        at_scale=SOFT,
        seeds=3,
    ),
    "joint": Row(
        title="+ hybrids, joint",
        label="joint",
        script="distill",
        arguments={**WITH_TAPS, "schedule.name": "joint"},
        at_scale=SOFT_HYBRIDS,
        seeds=3,
    ),
    "progressive": Row(
        title="+ hybrids, progressive",
        label="progressive",
        script="distill",
        arguments={**WITH_TAPS, "schedule.name": "progressive"},
        at_scale={  # two or three epochs: no stage for each tap
            **SOFT_HYBRIDS,
            "medium": {**SOFT["medium"], "taps": "[layer2]", "schedule.epochs": "[1, 1]"},
            "short": {**SOFT["short"], "taps": "[layer2]", "schedule.epochs": "[1, 2]"},
        },
    ),
    "stochastic": Row(
        title="+ hybrids, stochastic",
        label="stochastic",
        script="distill",
        arguments={**WITH_TAPS, "schedule.name": "stochastic"},
        at_scale=SOFT_HYBRIDS,
        seeds=3,
    ),
    "bptt": Row(
        title="BPTT from scratch",
        label="BPTT",
        script="train_snn",
        arguments=BPTT,
        at_scale=FRESH,
        teacher=False,
    ),
    "ann": Row(
        title="the same ANN on labels alone", label="ANN", script="train_teacher", at_scale=FRESH, teacher=False
    ),
}
_CONVERTED: dict[str, Row] = {
    "convert_lif": Row(
        title="calibrated twin, leak 0.5, no training",
        label="converted, LIF",
        script="convert",
        arguments={**CALIBRATED, **NO_TAPS},
    ),
    "convert_if": Row(
        title="calibrated twin, leak 1 (IF), no training",
        label="converted, IF",
        script="convert",
        arguments={**CALIBRATED, **NO_TAPS, "student.neuron.leak": "1.0", "eval_timesteps": "[8, 16, 32]"},
    ),
    "convert_spikingjelly": Row(
        title="SpikingJelly's converter (IF), no training",
        label="SpikingJelly's converter",
        script="convert",
        arguments={**NO_TAPS, "converter": "spikingjelly", "eval_timesteps": "[8, 16, 32]"},
    ),
}


def changed(base: Row, title: str, label: str, arguments: dict[str, str]) -> Row:
    """A row with other arguments, also at the scales that have some of their own; one seed."""
    at_scale = {
        scale: {name: value for name, value in more.items() if name not in arguments}
        for scale, more in base.at_scale.items()
    }
    return replace(
        base, title=title, label=label, arguments={**base.arguments, **arguments}, at_scale=at_scale, seeds=1
    )


def _of_the_best() -> dict[str, Row]:
    best = _TRAINED[BEST]
    rows = {
        f"{BEST}_t{steps}": changed(
            best, f"{BEST} at T = {steps}", f"{BEST}, T = {steps}", {"student.timesteps": f"{steps}"}
        )
        for steps in (1, 2, 8)
    }
    sew = {
        "student.name": "sew_resnet18",
        "student.init": "scratch",
        "init.adapters": "random",
        "train.freeze_norms": "false",
    }
    fresh = changed(best, f"{BEST}, student sew_resnet18", f"{BEST}, SEW", sew)
    at_scale = {
        scale: {**fresh.at_scale.get(scale, {}), **FRESH[scale], "student.width": f"{SCALES[scale].width}"}
        for scale in SCALES
    }
    return {**rows, f"{BEST}_sew": replace(fresh, at_scale=at_scale)}


ROWS: dict[str, Row] = {
    **_TRAINED,
    **_CONVERTED,
    **_of_the_best(),
    "tet": Row(
        title="TET with BPTT from scratch",
        label="TET",
        script="train_snn",
        arguments={**BPTT, "loss.name": "tet"},
        at_scale=FRESH,
        teacher=False,
    ),
}
"""In the order of worth; the names are those of the run folders."""
