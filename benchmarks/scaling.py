"""Memory and time for each image at 224 pixels, and what they mean for ImageNet on many GPUs.

    python -m benchmarks.scaling --precision bf16 --out benchmarks/results/NAME.md

Each row is a process of its own, whose peak memory is read at its end: a distillation step (joint, three hybrids) of a
twin of a timm ResNet, or the same network on labels alone (standalone). Memory for an image is the slope over batches.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where benchmarks, models and distill are

from benchmarks import machine

NETWORKS = ("resnet18", "resnet34", "resnet50")
TIMESTEPS, SIZE, CLASSES = 4, 224, 1000
TRAIN_IMAGES, EPOCHS = 1_281_167, 100
"""Of ImageNet-1k, and of the papers' recipe (configs/snn_imagenet.yaml)."""


def measure(network: str, variant: str, batch: int, precision: str, device: str, threads: int) -> dict[str, Any]:
    """One row, in this process."""
    import torch
    from torch import nn

    import models
    from benchmarks.distillation_cost import Variant, macs
    from benchmarks.measure import MB, forget_peak_memory, peak_memory_mb, saved_bytes
    from distill.report import versions

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    models.compile_kernels(True)
    images = torch.randn(batch, 3, SIZE, SIZE).to(device, memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,)).to(device)
    teacher = models.create_ann(network, CLASSES).to(device, memory_format=torch.channels_last)
    step = Variant(variant, teacher, images, labels, TIMESTEPS, precision)
    for number in range(2):
        step.step(number)
    forget_peak_memory(torch.device(device))
    seconds = [step.step(number) for number in range(3)]
    peak = peak_memory_mb(torch.device(device))
    with saved_bytes(step.network) as count:
        loss = step.loss(step.draws[0])
    saved = count() / MB
    del loss
    norms = [m.num_features for m in step.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    gmacs = macs(lambda: step.loss(step.draws[0]).backward()) / 1e9
    return {
        "network": network, "variant": variant, "batch": batch, "seconds": statistics.median(seconds), "peak_mb": peak,
        "saved_mb": saved, "parameters": sum(p.numel() for p in step.network.parameters()),
        "norm_channels": sum(norms), "norms": len(norms), "gmacs": gmacs,
        "precision": precision, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads, "versions": versions() | machine.cpu(),
    }  # fmt: skip


def slope(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Least squares: what one more image of a batch adds."""
    batches, values = [row["batch"] for row in rows], [row[name] for row in rows]
    return statistics.linear_regression(batches, values).slope


def traffic(row: dict[str, Any], gpus: int) -> tuple[float, float]:
    """Megabytes that a GPU sends in a step: gradients (a ring's all-reduce, float32) and batch-norm statistics.

    A norm gathers mean, variance and count (2 C + 1 numbers of each process), and reduces two sums of C numbers on the
    way back.
    """
    ring = 2 * (gpus - 1) / gpus
    gathered = (gpus - 1) * (2 * row["norm_channels"] + row["norms"])
    return 4 * ring * row["parameters"] / 1e6, 4 * (gathered + ring * 2 * row["norm_channels"]) / 1e6


def report(rows: list[dict[str, Any]], memory_gb: float, rates: Sequence[int]) -> str:
    """The measured rows, and the arithmetic from them, as Markdown."""
    first = rows[0]
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items())
    lines = [
        f"# Memory and time at {SIZE} pixels, T = {TIMESTEPS}",
        "",
        f"{datetime.date.today()}; {first['device']}, {first['threads']} threads, {first['precision']}; {versions}.",
        "Median of three steps after two; the peak is that of the whole process, on a GPU of the three steps.",
        "",
        "| network | step | batch | s a step | images/s | peak (MB) | kept for the backward pass (MB) | GMAC a step |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        speed = row["batch"] / row["seconds"]
        lines.append(
            f"| {row['network']} | {row['variant']} | {row['batch']} | {row['seconds']:.2f} | {speed:.2f} | "
            f"{row['peak_mb']:.0f} | {row['saved_mb']:.0f} | {row['gmacs']:.0f} |"
        )
    lines += [
        "",
        f"| network | step | peak, MB an image | kept, MB an image | s an image | batch that {memory_gb:g} GB hold |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["variant"]), []).append(row)
    for (network, variant), group in groups.items():
        if len(group) < 2:
            continue
        peak, kept, seconds = (slope(group, name) for name in ("peak_mb", "saved_mb", "seconds"))
        constant = group[0]["peak_mb"] - peak * group[0]["batch"]
        fits = int((1000 * memory_gb - constant) / peak)
        lines.append(f"| {network} | {variant} | {peak:.0f} | {kept:.0f} | {seconds:.2f} | {fits} |")
    lines += [
        "",
        f"Hours of {EPOCHS} epochs of ImageNet ({TRAIN_IMAGES:,} images), if one GPU trains so many images a second:",
        "",
        "| images/s of a GPU | " + " | ".join(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in (1, 8, 64)) + " |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for rate in rates:
        hours = [TRAIN_IMAGES * EPOCHS / (rate * gpus) / 3600 for gpus in (1, 8, 64)]
        lines.append(f"| {rate} | " + " | ".join(f"{h:,.0f}" for h in hours) + " |")
    lines += [
        "",
        "What a GPU sends in one step of the optimizer (MB): gradients, and batch-norm statistics where they are",
        "synchronised:",
        "",
        "| network | step | parameters (millions) | 8 GPUs | 64 GPUs |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (network, variant), group in groups.items():
        cells = [" + ".join(f"{value:.1f}" for value in traffic(group[0], gpus)) for gpus in (8, 64)]
        lines.append(f"| {network} | {variant} | {group[0]['parameters'] / 1e6:.1f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--networks", nargs="+", default=NETWORKS, help="timm's names; their stages are layer1 to layer4")
    add("--variants", nargs="+", default=("standalone", "joint"))
    add("--batches", nargs="+", type=int, default=(1, 2, 4, 8))
    add("--precision", choices=("fp32", "bf16"), default="bf16")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=2)
    add("--memory-gb", type=float, default=80.0, help="of a GPU, for the arithmetic")
    add("--rates", nargs="+", type=int, default=(100, 300, 1000), help="images/s of a GPU, for the arithmetic")
    add("--out", type=Path, help="a Markdown file; rows are kept beside it as .jsonl, and measured once")
    add("--child", nargs=3, metavar=("NETWORK", "VARIANT", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        network, variant, batch = options.child
        row = measure(network, variant, int(batch), options.precision, options.device, options.threads)
        print(json.dumps(row))
        return
    kept = options.out.with_suffix(".jsonl") if options.out else None
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept and kept.exists() else []
    known = {(row["network"], row["variant"], row["batch"]) for row in rows}
    for network in options.networks:
        for variant in options.variants:
            for batch in options.batches:
                if (network, variant, batch) in known:
                    continue
                command = [sys.executable, "-m", "benchmarks.scaling", "--child", network, variant, str(batch)]
                command += ["--precision", options.precision, "--device", options.device]
                command += ["--threads", str(options.threads)]
                out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                rows.append(json.loads(out.splitlines()[-1]))
                print(f"{network} {variant} {batch}: {rows[-1]['seconds']:.2f} s", file=sys.stderr)
                if kept:
                    with kept.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    text = report(rows, options.memory_gb, options.rates)
    options.out.write_text(text) if options.out else print(text)


if __name__ == "__main__":
    main()
