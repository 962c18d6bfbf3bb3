"""What each setting is worth: rows that differ from another one in that alone, run as the others are."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass

from benchmarks.study.rows import BEST, ROWS, SCALES, Row, changed


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """One table.

    Args:
        title: of the table.
        default: what the base row has.
        changes: arguments of the script, by what the table calls them.
        base: a name of `ROWS`.
        note: what is to be said below the title.
        scales: at which it is run where no rows are named: what states a learning rate suits one alone.
    """

    title: str
    default: str
    changes: dict[str, dict[str, str]]
    base: str = BEST
    note: str = ""
    scales: tuple[str, ...] = tuple(SCALES)

    def rows(self, group: str) -> dict[str, str]:
        """What the table calls each row, by the row's name."""
        return {f"{self.base}-{group}-{_for_a_file(label)}": label for label in self.changes}


def _each(name: str, *values: str) -> dict[str, dict[str, str]]:
    return {value: {name: value} for value in values}


def _in_turn(steps: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Each with the changes of those before it."""
    return dict(zip(steps, itertools.accumulate(steps.values(), operator.or_), strict=True))


WITH_LABELS = {"loss.student_ce": "1", "loss.hybrid_ce": "1", "loss.temperature": "2"}
"""The default of `distill.config.LossConfig`, with which the study began."""
_FIRST = {
    "student.init": "teacher",
    "student.neuron.leak": "0.2",
    "student.neuron.detach_reset": "true",
    "init.adapters": "random",
    "train.freeze_norms": "false",
    "train.lr": "0.03",
    **WITH_LABELS,
}
"""With which the study began, and missed its target for hybrids."""
_FIRST_SAID = (
    "the teacher's weights, leak 0.2, no gradient through the reset, statistics of the batch, learning rate 0.03, "
    "labels and logits of temperature 2 in the loss"
)
_STEPS = {
    "first": _FIRST,
    "then calibrated": {"student.init": "calibrated"},
    "then lr 0.003": {"train.lr": "0.003"},
    "then regression": {"init.adapters": "regression"},
    "then leak 0.5": {"student.neuron.leak": "0.5", "student.neuron.detach_reset": "false"},
    "then frozen norms": {"train.freeze_norms": "true", "train.lr": "0.001"},
}
"""What was changed since, in turn; a loss without labels is what is left to the default."""
_FRESH = {"student.init": "scratch", "train.freeze_norms": "false", "train.lr": "0.03"}

_SMALL_STEPS = {"train.lr": "0.004", "train.freeze_norms": "true", "loss.student_ce": "0"}
_SMALL_SAID = "Small: a learning rate of 0.004, the calibrated statistics, no labels, as in short trainings."

ABLATIONS: dict[str, Ablation] = {
    "loss": Ablation(
        title="Parts of the loss",
        default="student_kd and hybrid_kd of weight 1, no labels, no feature term",
        changes={
            "student_ce 1": {"loss.student_ce": "1"},
            "hybrid_ce 1": {"loss.hybrid_ce": "1"},
            "hybrid_kd 0.3": {"loss.hybrid_kd": "0.3"},
            "hybrid_kd 3": {"loss.hybrid_kd": "3"},
            "feature mse": {"loss.feature": "mse"},
        },
        scales=("short",),
    ),
    "labels": Ablation(
        title="AdamW, with labels in the loss and temperature 2",
        default="sgd (Nesterov momentum), no labels, temperature 4",
        changes={
            "adamw at 0.0002": {
                **WITH_LABELS,
                **{"train.optimizer": "adamw", "train.lr": "0.0002", "train.weight_decay": "0.01"},
            },
        },
        note="Labels with SGD are the last of the remedies.",
        scales=("short",),
    ),
    "temperature": Ablation(title="Temperature", default="4", changes=_each("loss.temperature", "1", "2", "8")),
    "taps": Ablation(title="Taps", default="stages", changes=_each("taps", "blocks")),
    "adapters": Ablation(title="Where adapters start", default="regression", changes=_each("init.adapters", "random")),
    "adapter": Ablation(
        title="Adapters",
        default="convolution of 1x1",
        changes=_each("adapter", "conv3x3", "norm"),
        note="Each with a batch norm and the activation behind it; norm: with nothing in front of it.",
    ),
    "init": Ablation(
        title="Where the student starts",
        default="calibrated",
        changes={"teacher": {"student.init": "teacher", "train.freeze_norms": "false"}},
        note="The teacher's weights as they are, with the statistics of the batch: there are no calibrated ones.",
    ),
    "labels_init": Ablation(
        title="Where the student on labels alone starts",
        default="calibrated",
        changes={"teacher": {"student.init": "teacher"}},
        base="teacher_weights",
        note="The teacher's weights as they are.",
        scales=("full",),
    ),
    "norms": Ablation(
        title="Statistics of the batch norms",
        default="the calibrated ones",
        changes={"of the batch": {"train.freeze_norms": "false"}},
        scales=("short",),
    ),
    "leak": Ablation(title="Leak", default="0.5", changes=_each("student.neuron.leak", "0.2", "1.0")),
    "converted": Ablation(
        title="Leak, without training",
        default="0.5",
        changes=_each("student.neuron.leak", "0.2", "0.3", "0.4", "0.6", "0.7", "0.8", "1.0"),
        base="convert_lif",
    ),
    "threshold": Ablation(title="Threshold", default="1", changes=_each("student.neuron.threshold", "0.5", "2")),
    "reset": Ablation(
        title="Gradient through the reset", default="yes", changes={"no": {"student.neuron.detach_reset": "true"}}
    ),
    "optimizer": Ablation(
        title="Optimizer",
        default="sgd (Nesterov momentum) at the row's learning rate",
        changes={
            f"adamw at {lr}": {"train.optimizer": "adamw", "train.lr": lr, "train.weight_decay": "0.01"}
            for lr in ("0.0002", "0.0005")
        },
        note="The weight decay of AdamW is PyTorch's default for it, 0.01.",
        scales=("short",),
    ),
    "lr": Ablation(title="Learning rate", default="the row's", changes=_each("train.lr", "0.001", "0.003", "0.01")),
    "kd_optimizer": Ablation(
        title="Optimizer of logit distillation",
        default="sgd (Nesterov momentum) at the row's learning rate",
        changes={"adamw at 0.0002": {"train.optimizer": "adamw", "train.lr": "0.0002", "train.weight_decay": "0.01"}},
        base="kd",
        scales=("short",),
    ),
    "kd_lr": Ablation(
        title="Learning rate of logit distillation",
        default="the row's",
        changes=_each("train.lr", "0.001", "0.003", "0.005"),
        base="kd",
        note="Losses of hybrids add to the gradient of the layers before their taps: without them a larger one may do.",
    ),
    "kd_steps": Ablation(
        title="Larger steps in logit distillation, on all images",
        default="0.02, statistics of the batch, labels",
        changes={
            "no labels": {"loss.student_ce": "0"},
            "0.05": {"train.lr": "0.05"},
            "0.2": {"train.lr": "0.2"},
            "calibrated statistics": {"train.freeze_norms": "true"},
            "small": _SMALL_STEPS,
            "bptt": {"student.algorithm": "bptt"},
            "0.05, no labels, bptt": {"train.lr": "0.05", "loss.student_ce": "0", "student.algorithm": "bptt"},
            "cutmix": {"train.cutmix": "1.0"},
        },
        base="kd",
        note=f"Learning rate, statistics of the batch norms, labels. {_SMALL_SAID}",
        scales=("full",),
    ),
    "steps": Ablation(
        title="Hybrids with smaller steps, on all images",
        default="0.02, statistics of the batch, labels",
        changes={"small": {**_SMALL_STEPS, "loss.hybrid_ce": "0"}},
        note=_SMALL_SAID,
        scales=("full",),
    ),
    "remedies": Ablation(
        title="One remedy after another",
        default="then the teacher's logits alone, temperature 4, lr 0.002",
        changes=_in_turn(_STEPS),
        note=f"From the setting with which the study began: {_FIRST_SAID}, adapters at random. Each row keeps the "
        "changes of the one before; the default, shown first, is the last of them.",
        scales=("short",),
    ),
    "kd_remedies": Ablation(
        title="Logit distillation without any of them",
        default="all of them",
        changes={
            "first": {name: _FIRST[name] for name in _FIRST if name != "init.adapters"},
            "all but the last": {**WITH_LABELS, "train.lr": "0.001"},
        },
        base="kd",
        note=f"The setting with which the study began: {_FIRST_SAID}. The last is a loss without labels.",
        scales=("short",),
    ),
    "kd_mixing": Ablation(
        title="Mixed images in logit distillation",
        default="none",
        changes={
            "mixup": {"train.mixup": "1.0"},
            "cutmix": {"train.cutmix": "1.0"},
        },
        base="kd",
        note="Beyer et al., CVPR 2022: a teacher that sees the mixed images, too, says more than it does of its own "
        "training images, which it knows.",
    ),
    "kd_algorithm": Ablation(
        title="Gradient of logit distillation",
        default="rate_m",
        changes=_each("student.algorithm", "rate_s", "bptt"),
        base="kd",
    ),
    "fresh": Ablation(
        title="From weights drawn anew",
        default="logit distillation of the calibrated twin",
        changes={"logit distillation": _FRESH, "three hybrids, joint": {**_FRESH, "taps": "stages"}},
        base="kd",
        note="A student that cannot have its teacher's weights: with the statistics of the batch, learning rate 0.03.",
        scales=("short",),
    ),
    "gradient_scale": Ablation(  # distillation has no such setting
        title="Scale of the gradient",
        default="none",
        changes=_each("loss.gradient_scale", "1/T"),
        base="scratch",
    ),
}


def _for_a_file(label: str) -> str:
    return label.replace(" ", "_").replace("/", "_over_")


def _rows() -> dict[str, Row]:
    rows = {}
    for group, ablation in ABLATIONS.items():
        for name, label in ablation.rows(group).items():
            title = f"{ablation.base}, {ablation.title[0].lower()}{ablation.title[1:]}: {label}"
            rows[name] = changed(ROWS[ablation.base], title, label, ablation.changes[label])
    return rows


ABLATION_ROWS: dict[str, Row] = _rows()


def ablation_rows(scale: str) -> list[str]:
    """Those of the ablations that are meant for a scale."""
    return [name for group, ablation in ABLATIONS.items() if scale in ablation.scales for name in ablation.rows(group)]


ALL_ROWS: dict[str, Row] = {**ROWS, **ABLATION_ROWS}
