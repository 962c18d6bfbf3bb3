"""Evaluation of a network that a run has left: a student or a hybrid, from its folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import EvaluationConfig, RunConfig
from distill.data import Preprocessing, Splits, eval_loader, load_data, prepare_loader
from distill.data.event_config import is_events
from distill.data.event_frames import summed
from distill.evaluation import TEACHER, firing_rates, top1
from distill.hybrid_network import KIND, Hybrid, load_hybrid
from distill.report import rate_warnings, versions
from distill.session import start
from distill.teachers import build_teacher, check_classes, has_weights
from models import SpikingNetwork, load_snn
from models.io import CONFIG, replace_text

log = logging.getLogger(__name__)


def run(config: EvaluationConfig) -> dict[str, Any]:
    """The job of scripts/evaluate.py.

    Returns:
        what it prints and, where `config.out` says so, writes: top-1 in percent at each number of time steps, agreement
        with the teacher where one is given, firing rates at the network's own T.

    Raises:
        FileNotFoundError: if the folder holds no network.
        ValueError: if the data has other classes than the network, or says nothing of how its images are made.
    """
    network = load_network(config.model)
    preprocessing = _preprocessing(network, config.model)
    settings = RunConfig(
        trackers=[], mixed_precision=config.mixed_precision, compile=config.compile, threads=config.threads
    )
    accelerator = start(settings, False, "run: {}").accelerator
    data = load_data(config.data, preprocessing, settings.seed, network.timesteps)
    _check_classes(network, data, config.model)
    teacher = None
    if has_weights(config.teacher):
        teacher = build_teacher(config.teacher, len(data.classes)).to(accelerator.device).eval()
        check_classes(config.teacher, teacher, len(data.classes))
    loader = prepare_loader(accelerator, eval_loader(data.eval, config.batch_size, workers=config.data.workers))
    network = network.to(accelerator.device).to(memory_format=torch.channels_last)
    own = network.timesteps
    rows = {}
    for steps in sorted({own, *config.timesteps}):
        network.timesteps = steps
        if steps != own and is_events(config.data):  # the recordings are cut anew, into as many frames
            others = load_data(config.data, preprocessing, settings.seed, steps)
            cut = prepare_loader(accelerator, eval_loader(others.eval, config.batch_size, workers=config.data.workers))
        else:
            cut = loader
        rows[steps] = top1(accelerator, cut, lambda images: _logits(network, teacher, images))
    network.timesteps = own
    rates = firing_rates(accelerator, loader, network)
    result = {
        "model": str(config.model),
        "kind": KIND if isinstance(network, Hybrid) else "student",
        "images": len(data.eval),
        "timesteps": own,
        "top1_by_timesteps": {steps: row["top1"] for steps, row in rows.items()},
        **({} if teacher is None else {"agreement_by_timesteps": {t: row["agreement"] for t, row in rows.items()}}),
        **({} if teacher is None else {TEACHER: rows[own][TEACHER]}),
        "mean_firing_rate": sum(rates.values()) / len(rates),
        "firing_rates": rates,
        "versions": versions(),
    }
    if accelerator.is_main_process:
        for line in rate_warnings(rates):
            log.warning("warning: %s", line)
        log.info("\n%s\n", evaluation_table(result))
        if config.out is not None:
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            replace_text(Path(config.out), json.dumps(result, indent=2) + "\n")
    accelerator.end_training()
    return result


def load_network(folder: str) -> SpikingNetwork | Hybrid:
    """A student or a hybrid, whichever the folder holds, in evaluation mode."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"model: {folder} holds no saved network: {CONFIG} is missing")
    try:
        kind = json.loads(path.read_text()).get("kind")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is no configuration of a network: {error}") from error
    return load_hybrid(folder) if kind == KIND else load_snn(folder)


def evaluation_table(result: dict[str, Any]) -> str:
    """Lines of text: a row for each number of time steps."""
    agreement = result.get("agreement_by_timesteps", {})
    lines = ["T    top-1 (%)" + ("  as the teacher (%)" if agreement else "")]
    for steps, value in result["top1_by_timesteps"].items():
        mark = " *" if steps == result["timesteps"] else ""
        lines.append(f"{steps:<3}  {value:9.2f}" + (f"  {agreement[steps]:18.2f}" if agreement else "") + mark)
    lines.append(f"* the T that the network was trained at; on {result['images']} images")
    if TEACHER in result:
        lines.append(f"teacher: {result[TEACHER]:.2f} %")
    lines.append(f"mean firing rate: {100 * result['mean_firing_rate']:.1f} % of the neurons in a step")
    return "\n".join(lines)


def _logits(network: nn.Module, teacher: nn.Module | None, images: Tensor) -> dict[str, Tensor]:
    return {**({} if teacher is None else {TEACHER: teacher(summed(images))}), "top1": network(images)}


def _preprocessing(network: SpikingNetwork | Hybrid, folder: str) -> Preprocessing:
    extra = network.spec.get("extra", {})
    try:
        return Preprocessing(
            input_size=tuple(extra["input_size"]),
            mean=tuple(extra["mean"]),
            std=tuple(extra["std"]),
            interpolation=extra.get("interpolation", "bilinear"),
            crop_pct=extra.get("crop_pct", 1.0),
        )
    except KeyError as error:
        missing = f"extra.{error.args[0]} is missing"
        raise ValueError(f"{folder}/{CONFIG} does not say how images are made: {missing}") from None


def _check_classes(network: SpikingNetwork | Hybrid, data: Splits, folder: str) -> None:
    known = network.spec["extra"].get("classes")
    if known is not None and list(known) != list(data.classes):
        different = sorted(set(known) ^ set(data.classes))[:3]
        raise ValueError(
            f"the network in {folder} knows {len(known)} classes, the data has {len(data.classes)}"
            + (f"; not in both: {different}" if different else ", in another order")
        )
