"""How well the rate-based gradient points where backpropagation through time does, layer by layer.

    python benchmarks/gradient_cosine.py --model runs/x/student --root DIR --out benchmarks/results/NAME.md

Takes a trained spiking network and real images, and computes the gradient of the same cross-entropy of the same
weights with rate_m (or another rule) and with BPTT. The cosine is that of the whole gradient of each weight, over one
batch at a time, averaged over batches (Yu et al., NeurIPS 2024, show it for T up to 6).
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data import DataConfig, Preprocessing, load_data
from distill.report import versions
from models import SpikingNetwork, load_snn, set_algorithm


def gradients(snn: SpikingNetwork, algorithm: str, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of each parameter, by name, for the mean cross-entropy of images (B, C, H, W); buffers are kept."""
    buffers = {name: buffer.clone() for name, buffer in snn.named_buffers()}
    set_algorithm(snn, algorithm).zero_grad(set_to_none=True)
    torch.manual_seed(0)  # the same Poisson input and dropout for each algorithm
    F.cross_entropy(snn.train()(images), labels).backward()
    with torch.no_grad():
        for name, buffer in snn.named_buffers():
            buffer.copy_(buffers[name])
    return {name: p.grad.detach().clone() for name, p in snn.named_parameters() if p.grad is not None}


def cosines(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The cosine between two gradients: of each weight with more than one axis, and of "all" parameters together."""
    found = {
        name: F.cosine_similarity(ours[name].flatten(), theirs[name].flatten(), dim=0).item()
        for name in theirs
        if theirs[name].ndim > 1
    }
    a, b = (torch.cat([g[name].flatten() for name in theirs]) for g in (ours, theirs))
    return {**found, "all": F.cosine_similarity(a, b, dim=0).item()}


def measure(snn: SpikingNetwork, algorithm: str, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Cosines between an algorithm and BPTT, mean over batches."""
    rows = [cosines(gradients(snn, algorithm, *batch), gradients(snn, "bptt", *batch)) for batch in batches]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def table(columns: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each weight, a column for each setting."""
    names = next(iter(columns.values()))
    lines = ["| weight | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [f"| {name} | " + " | ".join(f"{c[name]:.3f}" for c in columns.values()) + " |" for name in names]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved spiking network, e.g. runs/x/student")
    parser.add_argument("--root", help="folder with train/ and val/ (or tars); without it, scikit-learn's digits")
    parser.add_argument("--algorithms", nargs="+", default=["rate_m"], choices=["rate_m", "rate_s"])
    parser.add_argument("--timesteps", nargs="+", type=int, default=[1, 2, 4, 6, 8])
    parser.add_argument("--batch", type=int, default=64, help="images of a batch")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--out", help="Markdown file to write; printed in any case")
    args = parser.parse_args()

    snn = load_snn(args.model)
    extra = snn.spec.get("extra")
    if extra is None:
        parser.error(f"{args.model}: config.json does not say how its images were normalised (no entry 'extra')")
    pre = Preprocessing(input_size=tuple(extra["input_size"]), mean=tuple(extra["mean"]), std=tuple(extra["std"]))
    data = DataConfig(name="folder", root=args.root, max_train_samples=args.batch * args.batches)
    splits = load_data(data if args.root else DataConfig(max_train_samples=args.batch * args.batches), pre)
    loader = torch.utils.data.DataLoader(splits.train, args.batch, shuffle=False)
    batches = [(images, labels) for images, labels in loader]
    trained = snn.timesteps
    columns = {}
    for algorithm in args.algorithms:
        for steps in args.timesteps:
            snn.timesteps = steps
            columns[f"{algorithm}, T = {steps}"] = measure(snn, algorithm, batches)
    packages = ", ".join(f"{name} {value}" for name, value in versions().items())
    text = f"""# Cosine between the rate-based gradient and backpropagation through time

{snn.spec.get("name", "twin")} (trained with T = {trained}) on {len(batches)} batches of {args.batch} training images,
float32, {datetime.date.today()}; {packages}.

{table(columns)}
"""
    print(text)
    if args.out:
        Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
