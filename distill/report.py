"""What a run tells its user: the table, summary.json and the model card."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from distill.energy_table import energy_columns, energy_lines
from models import card

log = logging.getLogger(__name__)

GRADIENTS = {
    "rate_m": "rate-based backpropagation (Yu et al., NeurIPS 2024)",
    "rate_s": "rate-based backpropagation, a step at a time (Yu et al., NeurIPS 2024)",
    "bptt": "surrogate gradients through time",
    "ottt": "online training through time (Xiao et al., NeurIPS 2022)",
    "sltt": "spatial learning through time (Meng et al., ICCV 2023)",
    "dsr": "differentiation on spike representation (Meng et al., CVPR 2022)",
    "ide": "implicit differentiation on the equilibrium (Xiao et al., NeurIPS 2021)",
    "spide": "implicit differentiation on the equilibrium by backward spikes (Xiao et al., Neural Networks 2023)",
}
"""What each algorithm of `models.ALGORITHMS` is called, and where it comes from."""

SILENT, SATURATED = 0.01, 0.95
"""Firing rates below or above which a layer hardly passes information on."""


def versions() -> dict[str, str]:
    """Of Python and of every package that a result depends on."""
    names = ("spikeswap", "torch", "torchvision", "timm", "accelerate", "spikingjelly")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def table(summary: dict[str, Any]) -> str:
    """The summary's accuracies as lines of text, the student's own T marked; teacher and hybrids where it has them.

    With energies, where they are known, and what they rest on.
    """
    own = summary["timesteps"]
    rows = [("teacher", summary["teacher_top1"], ("teacher", None))] if "teacher_top1" in summary else []
    rows += [
        (f"hybrid up to {tap}", value, (f"hybrid/{tap}", own)) for tap, value in summary.get("hybrid_top1", {}).items()
    ]
    rows += [(f"SNN, T = {own}", summary["student_top1"], ("student", own))]
    others = summary["student_top1_by_timesteps"].items()
    rows += [(f"  evaluated at T = {steps}", value, ("student", steps)) for steps, value in others]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'network':<{width}}  top-1 (%)", f"{'-' * width}  ---------"]
    lines += [f"{name:<{width}}  {value:9.2f}" for name, value, _ in rows]
    if not summary.get("frontier"):
        return "\n".join(lines)
    energies = {(row["network"], row["timesteps"]): row for row in summary["frontier"]}
    reference = energies.get(("teacher", None))
    headings, cells = energy_columns([energies.get(key) for _, _, key in rows], reference)
    more = [headings, ["-" * len(heading) for heading in headings], *cells]
    lines = ["  ".join([line, *columns]).rstrip() for line, columns in zip(lines, more, strict=True)]
    return "\n".join([*lines, *energy_lines(summary["energy_assumptions"], reference)])


def rate_warnings(rates: dict[str, float]) -> list[str]:
    """One line for each layer that is (almost) silent or fires (almost) always."""
    lines = []
    for name, rate in rates.items():
        if rate < SILENT:
            lines.append(f"layer {name} is almost silent: {100 * rate:.2f} % of its neurons fire in a step")
        elif rate > SATURATED:
            lines.append(f"layer {name} fires almost always: {100 * rate:.1f} % of its neurons fire in a step")
    return lines


def warn_of_skipped(names: Sequence[str]) -> None:
    """Says how many images were left out, where there are any, and which is the first; a result names them all."""
    if names:
        log.warning("warning: %d images could not be read and were left out, the first: %s", len(names), names[0])


def model_card(summary: dict[str, Any], teacher: str | None, data: str, config: str, events: bool = False) -> str:
    """README.md of a student's folder.

    Args:
        teacher: its timm name; None for a network that learned from labels alone.
        data: what it was trained on, for people.
        config: the resolved YAML.
        events: whether the network was trained on event frames.
    """
    packages = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    gradient = GRADIENTS[summary["algorithm"]]
    tags: tuple[str, ...] = ()
    if teacher is None:
        title = "Spiking network"
        how = f"Trained on labels, from the start that the configuration below names, with {gradient},"
    else:
        tags, title = ("distillation",), f"Spiking network distilled from {teacher}"
        how = f"Block-wise hybrid replacement (Yang et al., CVPR 2025) with {gradient},"
    facts = f"""{summary["timesteps"]} time steps, {summary["parameters"]:,} parameters, trained on {data}.

```
{table(summary)}
```

Mean firing rate: {100 * summary["mean_firing_rate"]:.1f} % of the neurons in a step, mean over the layers."""
    made = f"""{how}
by {packages}.

```yaml
{config.strip()}
```"""
    return card.model_card(title, facts, made, tags, card.USE_ON_FRAMES if events else card.USE_ON_IMAGES)


_USE_OF_HYBRIDS = """import distill  # of the package spikeswap

hybrid = distill.load_hybrid("path/of/this/folder")  # or the id on the hub, "owner/name"
logits = hybrid(images)  # (B, C, H, W), or event frames; normalised as config.json says under "extra"
"""


def hybrid_card(tap: str, teacher: str, timesteps: int, summary: dict[str, Any], config: str) -> str:
    """README.md of a hybrid's folder.

    Args:
        tap: where it is cut.
        teacher: its timm name.
        timesteps: T of its spiking part.
        summary: of the run that made it; empty where that is not at hand.
        config: the run's resolved YAML; empty likewise.
    """
    facts = f"A spiking network of {timesteps} time steps up to `{tap}`, a learned adapter, and {teacher} behind it."
    if tap in (accuracies := summary.get("hybrid_top1", {})):
        facts += f"\n\nTop-1: {accuracies[tap]:.2f} % (the teacher: {summary['teacher_top1']:.2f} %)."
    made = f"Block-wise hybrid replacement (Yang et al., CVPR 2025), cut at `{tap}`."
    if config:
        gradient = GRADIENTS[summary["algorithm"]]
        packages = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
        made = f"{made[:-1]}, with {gradient}, by {packages}.\n\n```yaml\n{config.strip()}\n```"
    title = f"Hybrid of a spiking network and {teacher}"
    return card.model_card(title, facts, made, ("distillation",), _USE_OF_HYBRIDS)
