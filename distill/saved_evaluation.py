"""Evaluation of a network that a run has left: a student or a hybrid, from its folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from distill.class_names import check_class_names
from distill.config import EvaluationConfig, TeacherConfig
from distill.data import Preprocessing, Splits, load_data, skipped_images
from distill.data.event_config import is_events
from distill.energy import assumptions
from distill.evaluation import TEACHER
from distill.evaluation_report import csv_text, evaluation_table
from distill.evaluator import AtTimesteps, Evaluator
from distill.frontier import ENERGY_IMAGES
from distill.hybrid_network import KIND, Hybrid, load_hybrid, parameters_that_run
from distill.judgement import BINS
from distill.network_energy import NetworkEnergy
from distill.report import rate_warnings, versions, warn_of_skipped
from distill.session import start
from distill.teachers import build_teacher, check_accuracy, check_classes, check_same_images, has_weights
from distill.train_config import RunConfig
from models import SpikingNetwork, load_snn
from models.hub import saved_network
from models.io import CONFIG, replace_text
from models.preprocessing import preprocessing_of

log = logging.getLogger(__name__)


def run(config: EvaluationConfig) -> dict[str, Any]:
    """The job of scripts/evaluate.py.

    Returns:
        what it prints and, where the configuration says so, writes: at each number of time steps accuracies, agreement
        with the teacher where one is given, calibration error, firing rates and energy; early exit at the largest.

    Raises:
        FileNotFoundError: if the folder holds no network.
        ValueError: if the data has other classes than the network, or says nothing of how its images are made; if
            statistics are to be estimated anew where there are none, or no images for it; if the teacher wants other
            images than the network, or is less accurate than was asked for.
    """
    network = load_network(config.model)
    preprocessing = images_of(network, config.model)
    if has_weights(config.teacher):
        check_same_images(config.teacher, preprocessing)
    settings = RunConfig(
        trackers=[], mixed_precision=config.mixed_precision, compile=config.compile, threads=config.threads
    )
    accelerator = start(settings, False, "run: {}").accelerator
    log.info("images: %s", preprocessing)
    # where the network names no classes, those of the training split tell a held-out one that lacks some
    training = config.recalibrate or network.spec["extra"].get("classes") is None
    data = load_data(config.data, preprocessing, settings.seed, network.timesteps, training)
    _check_classes(network, data, config.model)
    if config.recalibrate and len(data.train) == 0:
        raise ValueError(f"recalibrate takes training images: data.name={config.data.name!r} has none")
    teacher = None
    if has_weights(config.teacher):
        teacher = build_teacher(config.teacher, len(data.classes)).to(accelerator.device).eval()
        check_classes(config.teacher, teacher, data.classes)
    network = network.to(accelerator.device).to(memory_format=torch.channels_last)
    energy = NetworkEnergy(network, torch.zeros(1, *preprocessing.input_size, device=accelerator.device), teacher)
    evaluator = Evaluator(config, accelerator, network, teacher, energy)
    own, found = network.timesteps, {}
    wanted = sorted({own, *config.timesteps})
    for steps in wanted:
        cut = data
        if steps != own and is_events(config.data):  # the recordings are cut anew, into as many frames
            cut = load_data(config.data, preprocessing, settings.seed, steps, training)
        exits = steps == wanted[-1] and bool(config.exit_thresholds)
        found[steps] = evaluator.at(steps, cut, settings.seed, exits)
        if steps == wanted[0]:
            _check_teacher(config.teacher, found[steps], len(cut.eval), len(data.classes))
    network.timesteps = own
    skipped = list(skipped_images(accelerator, data.eval))
    result = _result(config, network, preprocessing, len(data.eval), skipped, found, energy)
    if accelerator.is_main_process:
        warn_of_skipped(skipped)
        for line in rate_warnings(result["firing_rates"]):
            log.warning("warning: %s", line)
        log.info("\n%s\n", evaluation_table(result))
        for file, text in ((config.out, json.dumps(result, indent=2) + "\n"), (config.csv, csv_text(result))):
            if file is not None:
                Path(file).parent.mkdir(parents=True, exist_ok=True)
                replace_text(Path(file), text)
    accelerator.end_training()
    return result


def _result(
    config: EvaluationConfig,
    network: SpikingNetwork | Hybrid,
    preprocessing: Preprocessing,
    images: int,
    skipped: list[str],
    found: dict[int, AtTimesteps],
    energy: NetworkEnergy,
) -> dict[str, Any]:
    """What --out holds, in JSON types but for the numbers of time steps, which are keys."""
    own, last = network.timesteps, max(found)
    rows = {steps: at.entries() for steps, at in found.items()}
    hybrid = isinstance(network, Hybrid)
    size = preprocessing.input_size
    parameters = parameters_that_run(network, size) if hybrid else sum(p.numel() for p in network.parameters())
    teacher = found[own].teacher
    return {
        "model": str(config.model),
        "kind": KIND if hybrid else "student",
        "images": images,
        "skipped_images": skipped,
        "timesteps": own,
        "parameters": parameters,
        "input_size": list(size),
        "crop_pct": preprocessing.crop_pct,
        "crop_mode": preprocessing.crop_mode,
        "interpolation": preprocessing.interpolation,
        "recalibration_images": found[own].recalibration_images,
        "top1_by_timesteps": {steps: row["top1"] for steps, row in rows.items()},
        **({} if teacher is None else {"agreement_by_timesteps": {t: row["agreement"] for t, row in rows.items()}}),
        **({} if teacher is None else {TEACHER: teacher.top1, "teacher_top5": teacher.top5}),
        "mean_firing_rate": rows[own]["mean_firing_rate"],
        "firing_rates": rows[own]["firing_rates"],
        "by_timesteps": rows,
        "ece_bins": BINS,
        "early_exit": {"timesteps": last, "thresholds": found[last].exits} if found[last].exits else None,
        "analogue_energy": None if energy.reference is None else energy.reference.figures(),
        "energy_assumptions": assumptions(min(ENERGY_IMAGES, images)),
        "versions": versions(),
    }


def load_network(folder_or_id: str) -> SpikingNetwork | Hybrid:
    """A student or a hybrid, whichever a folder or a repository of the hub holds, in evaluation mode.

    Raises:
        FileNotFoundError: names the folder or id, and the file that is missing.
        ValueError: if its configuration is none, or does not fit the weights.
    """
    folder = saved_network(folder_or_id, "network")
    try:
        kind = json.loads((folder / CONFIG).read_text()).get("kind")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is no configuration of a network: {error}") from error
    return load_hybrid(folder) if kind == KIND else load_snn(folder)


def images_of(network: SpikingNetwork | Hybrid, model: str) -> Preprocessing:
    """How a saved network wants its images.

    Args:
        model: where it comes from, for the message.

    Raises:
        ValueError: names the entry of its configuration that is missing or wrong.
    """
    try:
        return preprocessing_of(network.spec)
    except ValueError as error:
        raise ValueError(f"{model}/{CONFIG}: {error}") from error


def _check_teacher(config: TeacherConfig, at: AtTimesteps, images: int, classes: int) -> None:
    """A teacher below the bound that somebody stated is refused; one that guesses is a warning: it cost nothing."""
    if at.teacher is None:
        return
    try:
        check_accuracy(config, at.teacher.top1, images, classes)
    except ValueError as error:
        if config.min_top1 is not None:
            raise
        log.warning("warning: %s", error)


def _check_classes(network: SpikingNetwork | Hybrid, data: Splits, folder: str) -> None:
    check_class_names(f"the network in {folder}", network.spec["extra"].get("classes"), data.classes)
