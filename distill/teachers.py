"""Teachers: a timm network, its weights, and the preprocessing that they were trained with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import timm.data
from torch import nn

from distill.class_names import check_class_names
from distill.config import TeacherConfig
from distill.data import Preprocessing
from models import create_ann, load_weights
from models.io import CONFIG, WEIGHTS
from models.preprocessing import preprocessing_of


def has_weights(config: TeacherConfig) -> bool:
    """Whether the teacher comes trained."""
    return config.pretrained or config.weights is not None


def build_teacher(config: TeacherConfig, num_classes: int, weights: str | Path | None = None) -> nn.Module:
    """Makes the network and loads its weights, where there are any.

    Args:
        num_classes: of the data.
        weights: a safetensors file or its folder, instead of what the configuration names.

    Raises:
        FileNotFoundError: if there are no such weights.
        ValueError: for an unknown network or argument, or weights that do not fit.
    """
    in_chans = (config.input_size or _beside(config.weights).get("input_size") or [3])[0]
    path = weights or config.weights
    teacher = create_ann(
        config.name, num_classes, in_chans, config.cifar_stem, config.pretrained and path is None, config.kwargs
    )
    if path is not None:
        path = Path(path)
        load_weights(teacher, path / WEIGHTS if path.is_dir() else path)
    return teacher


def check_classes(config: TeacherConfig, teacher: nn.Module, classes: Sequence[str]) -> None:
    """timm gives pretrained weights a fresh classifier where the number of classes differs: no teacher for anyone.

    Args:
        classes: of the data, by name.

    Raises:
        ValueError: if the pretrained weights know another number of classes than the data, or the folder of the weights
            names other classes or has them in another order.
    """
    known: Any = teacher.pretrained_cfg
    if config.pretrained and known.get("num_classes") not in (None, len(classes)):
        raise ValueError(
            f"the weights of {config.name!r} know {known['num_classes']} classes, the data has {len(classes)}: "
            "fine-tune the teacher with scripts/train_teacher.py and give its folder as teacher.weights"
        )
    file, extra = _extra_beside(config.weights)
    names = extra.get("classes")  # none in a folder that was left before they were written
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{file}: extra.classes must be a list of names, found {names!r}")
    way_out = (
        ". data.class_map states the order of a folder's classes; where the two sets of names mean the same, take "
        f"extra.classes out of {file}"
    )
    check_class_names(f"the teacher {config.name!r} of teacher.weights", names, classes, way_out)


def check_accuracy(config: TeacherConfig, top1: float, images: int, classes: int) -> None:
    """A teacher that guesses has nothing to teach; most often its images are not what it was trained on.

    Args:
        top1: its accuracy in percent on so many evaluation images.
        classes: K; guessing is right on 100 / K percent, with a standard deviation that the number of images gives.

    Raises:
        ValueError: below `config.min_top1` or, where that is None, three standard deviations above guessing.
    """
    chance = 1 / classes
    guessing = 100 * (chance + 3 * math.sqrt(chance * (1 - chance) / images))
    least = min(guessing, 100.0) if config.min_top1 is None else config.min_top1
    if top1 < least:
        raise ValueError(
            f"the teacher {config.name!r} is right on {top1:.2f} % of the {images} evaluation images, at least "
            f"{least:.2f} % are wanted (guessing: {100 * chance:.2f} %). Likely causes: its images are normalised or "
            "sized otherwise than in its training (teacher.mean, .std, .input_size, .interpolation); the classes are "
            "in another order (data.class_map); its head was never trained on them. teacher.min_top1 changes the bound"
        )


def teacher_preprocessing(config: TeacherConfig, group: str = "teacher") -> Preprocessing:
    """The images that the network expects: as its weights came with, where the configuration is silent.

    Args:
        group: what the configuration is called where a user sets it.

    Raises:
        ValueError: names the fields to set where neither says anything.
    """
    known = _known_preprocessing(config)
    missing = [f"{group}.{name}" for name in ("input_size", "mean", "std") if name not in known]
    if missing:
        optional = f"{group}.interpolation (else bilinear), {group}.crop_pct (else 1), {group}.crop_mode (else center)"
        raise ValueError(
            f"how the {group}'s images are sized and normalised is not known: set {', '.join(missing)}; optional: "
            f"{optional}. Weights loaded with {group}.pretrained bring all of it along, and so does a folder as "
            f"{group}.weights that scripts/train_teacher.py wrote"
        )
    return Preprocessing(**known)


def check_same_images(config: TeacherConfig, network: Preprocessing) -> None:
    """One image is shown to a network and to the teacher beside it, made as the network wants it.

    Args:
        network: what that is. Fields that nobody stated of the teacher are not compared.

    Raises:
        ValueError: names the fields in which the teacher wants another one, with both values.
    """
    known = _known_preprocessing(config)
    wanted = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
    pairs = {name: (value, network.entries()[name]) for name, value in wanted.items()}
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if different:
        shown = "; ".join(f"{name} {teachers}, the network's {own}" for name, (teachers, own) in different.items())
        options = " ".join(f"--teacher.{name} '{own}'" for name, (_, own) in different.items())
        raise ValueError(
            f"the teacher {config.name!r} wants other images than the network, beside which it is judged on the "
            f"network's: {shown}. Name a teacher of the same images or, to judge this one on these all the same, "
            f"say {options}"
        )


def _known_preprocessing(config: TeacherConfig) -> dict[str, Any]:
    """Fields of `Preprocessing` that somebody stated: the configuration or, where it is silent, who left weights."""
    known = _beside(config.weights)
    if config.pretrained:
        ann = create_ann(config.name, kwargs=config.kwargs)  # without weights: only its data configuration is wanted
        known = timm.data.resolve_model_data_config(ann)
    names = [field.name for field in fields(Preprocessing)]
    stated = {name: value for name in names if (value := getattr(config, name)) is not None}
    values = {name: known[name] for name in names if name in known} | stated
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _beside(weights: str | None) -> dict[str, Any]:
    """What `train_teacher` wrote of the images; empty for weights of elsewhere, or of before it did.

    Args:
        weights: its folder, or the file in it.

    Raises:
        ValueError: if that cannot be read; names the file.
    """
    file, extra = _extra_beside(weights)
    try:
        return asdict(preprocessing_of({"extra": extra})) if extra else {}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _extra_beside(weights: str | None) -> tuple[Path, dict[str, Any]]:
    """The configuration beside some weights, and its entry "extra"; empty where there is none."""
    path = Path(weights or "")
    file = (path if path.is_dir() else path.parent) / CONFIG
    if weights is None or not (path.is_dir() or path.name == WEIGHTS) or not file.is_file():
        return file, {}
    try:
        spec = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    extra = spec.get("extra") if isinstance(spec, dict) else None
    return file, extra if isinstance(extra, dict) else {}
