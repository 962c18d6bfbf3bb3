"""What scripts/evaluate.py prints, and its CSV."""

from __future__ import annotations

import csv
import io
from pathlib import PurePath
from typing import Any

from distill.energy_table import energy_columns, energy_lines

TIMM_COLUMNS = (
    "model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation",
)  # fmt: skip
"""Of the files in timm's results/: accuracies and errors in percent, parameters in millions."""
OWN_COLUMNS = ("agreement", "ece", "mean_firing_rate", "compute_uj", "memory_uj", "macs", "acs", "mac_share_of_layers")


def evaluation_table(result: dict[str, Any]) -> str:
    """Lines of text: a row for each number of time steps, early exit, and what the figures mean."""
    rows, own = result["by_timesteps"], result["timesteps"]
    agreement = result.get("agreement_by_timesteps") is not None
    headings = ["top-1 (%)", "top-5 (%)", *(["as the teacher (%)"] if agreement else []), "  ECE", "firing (%)"]
    energies, cells = energy_columns(list(rows.values()), result["analogue_energy"])
    lines = ["  ".join(["T  ", *headings, *energies, "MAC layers (%)"])]
    for (steps, row), energy in zip(rows.items(), cells, strict=True):
        values = [f"{row['top1']:.2f}", f"{row['top5']:.2f}", *([f"{row['agreement']:.2f}"] if agreement else [])]
        values += [f"{row['ece']:.3f}", f"{100 * row['mean_firing_rate']:.1f}"]
        columns = [value.rjust(len(heading)) for value, heading in zip(values, headings, strict=True)]
        share = f"{100 * row['mac_share_of_layers']:.1f}".rjust(len("MAC layers (%)"))
        lines.append("  ".join([f"{steps:<3}", *columns, *energy, share]) + (" *" if steps == own else ""))
    lines.append(f"* the T that the network was trained at; on {result['images']} images")
    if "teacher_top1" in result:
        lines.append(f"teacher: top-1 {result['teacher_top1']:.2f} %, top-5 {result['teacher_top5']:.2f} %")
    if result["recalibration_images"] is not None:
        lines.append(f"batch-norm statistics: of {result['recalibration_images']} training images, at each T")
    lines.append(f"ECE: expected calibration error, {result['ece_bins']} bins of equal width")
    if result["early_exit"] is not None:
        lines += ["", *_exit_lines(result)]
    lines += ["", *_layer_lines(result), ""]
    lines += energy_lines(result["energy_assumptions"], result["analogue_energy"], "the analogue network's")
    return "\n".join(lines)


def _exit_lines(result: dict[str, Any]) -> list[str]:
    exits = result["early_exit"]
    lines = [f"early exit, at most {exits['timesteps']} steps: when the margin of the mean logits so far reaches"]
    if result["kind"] == "hybrid":
        lines[0] += "; the teacher's blocks run after each step"
    lines.append("margin  top-1 (%)  mean steps")
    for row in exits["thresholds"]:
        lines.append(f"{row['threshold']:<6g}  {row['top1']:9.2f}  {row['mean_steps']:10.2f}")
    return lines


def _layer_lines(result: dict[str, Any]) -> list[str]:
    """Firing rates of each layer at each T."""
    rows = result["by_timesteps"]
    names = list(result["firing_rates"])
    width = max(len(name) for name in [*names, "neurons firing in a step (%)"])
    lines = ["  ".join([f"{'neurons firing in a step (%)':<{width}}", *[f"{f'T = {steps}':>7}" for steps in rows]])]
    for name in names:
        rates = [f"{100 * row['firing_rates'][name]:7.1f}" for row in rows.values()]
        lines.append("  ".join([f"{name:<{width}}", *rates]))
    return lines


def csv_text(result: dict[str, Any]) -> str:
    """timm's results columns, T and our own, a row for each T."""
    columns = [*TIMM_COLUMNS, "timesteps", "recalibrated", *OWN_COLUMNS]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for steps, row in result["by_timesteps"].items():
        accuracies = {name: round(row[name], 4) for name in ("top1", "top5")}
        errors = {f"{name}_err": round(100 - row[name], 4) for name in ("top1", "top5")}
        network = {
            "model": PurePath(result["model"]).as_posix(),
            "param_count": round(result["parameters"] / 1e6, 2),
            "img_size": result["input_size"][-1],
            "crop_pct": result["crop_pct"],
            "interpolation": result["interpolation"],
            "timesteps": steps,
            "recalibrated": result["recalibration_images"] is not None,
        }
        writer.writerow(network | accuracies | errors | {name: row[name] for name in OWN_COLUMNS if name in row})
    return text.getvalue()
