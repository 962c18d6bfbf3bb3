"""How close the rate-based gradients are to backpropagation through time (BPTT), layer by layer: direction and length.

    python -m benchmarks.gradient_cosine --model runs/x/student --fresh --root DIR --out benchmarks/results/NAME.md

Takes a saved spiking network and real images, and computes the gradients of the same cross-entropy at the same weights
with a rate rule and with BPTT: the cosine between the two, and how many times as long the rate rule's is, for each
weight over a batch. The weights are those that were trained, with --fresh also weights that are drawn anew, and with
--weights also those of a file: a twin takes its teacher's, where its distillation starts. A seed has a batch, and fresh
weights, of its own. Yu et al., NeurIPS 2024, compare the two directions in Figure 3 d.

Each rule has a BPTT of its own, which trains the same network: rate_m normalises with the statistics of all steps,
rate_s each step by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor

from benchmarks.machine import cpu
from distill.data import DataConfig, Preprocessing, load_data
from distill.preparation import freeze_norms
from distill.report import versions
from models import SpikingNetwork, load_snn, load_weights, set_algorithm
from models.io import build_snn

REFERENCE = {"rate_m": "bptt", "rate_s": "bptt_by_step"}
"""With which BPTT a rule is compared: bptt_by_step normalises each time step by itself, as rate_s does."""
ALL = "all parameters"
NONE = "-"
"""In a table, of a weight without a gradient: batch norms that start at 0 let none pass."""

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and labels (B,)."""


class Closeness(NamedTuple):
    """Of a gradient to that of BPTT; NaN where either is 0."""

    cosine: float
    ratio: float
    """Its length in units of that of BPTT."""


def gradients(
    snn: SpikingNetwork, algorithm: str, images: Tensor, labels: Tensor, frozen_norms: bool = False
) -> dict[str, Tensor]:
    """The gradient of each parameter, by name, for the mean cross-entropy of images (B, C, H, W); buffers are kept.

    Args:
        algorithm: one of the network's, or "bptt_by_step": the network runs a step at a time on plain tensors, with the
            graph of all steps. Dropout draws a mask for each step there, Poisson input the same numbers.
        frozen_norms: batch norms take their running statistics, as in a training with train.freeze_norms.
    """
    buffers = {name: buffer.clone() for name, buffer in snn.named_buffers()}
    by_step = algorithm == "bptt_by_step"
    set_algorithm(snn, "bptt" if by_step else algorithm).train().zero_grad(set_to_none=True)
    if frozen_norms:
        freeze_norms(snn)
    torch.manual_seed(0)  # the same Poisson input and dropout for each algorithm
    F.cross_entropy(_by_step(snn, images) if by_step else snn(images), labels).backward()
    with torch.no_grad():
        for name, buffer in snn.named_buffers():
            buffer.copy_(buffers[name])
    return {name: p.grad.detach().clone() for name, p in snn.named_parameters() if p.grad is not None}


def _by_step(snn: SpikingNetwork, images: Tensor) -> Tensor:
    """The mean of the logits of all steps, (B, classes)."""
    functional.set_step_mode(snn, "s")
    try:
        logits = torch.stack([snn(images) for _ in range(snn.timesteps)])
    finally:
        functional.reset_net(snn)
        functional.set_step_mode(snn, "m")
    return logits.mean(0)


def closeness(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Closeness]:
    """Of each weight with more than one axis, and of all parameters together."""
    found = {name: _close(ours[name], theirs[name]) for name in theirs if theirs[name].ndim > 1}
    both = (torch.cat([g[name].flatten() for name in theirs]) for g in (ours, theirs))
    return {**found, ALL: _close(*both)}


def _close(a: Tensor, b: Tensor) -> Closeness:
    a, b = a.double().flatten(), b.double().flatten()
    if not (a.any() and b.any()):
        return Closeness(math.nan, math.nan)
    return Closeness((a @ b / (a.norm() * b.norm())).item(), (a.norm() / b.norm()).item())


def measure(
    networks: list[SpikingNetwork], rule: str, batches: list[Batch], frozen_norms: bool = False
) -> dict[str, list[Closeness]]:
    """By weight: of each network on its batch."""
    rows = [
        closeness(*(gradients(snn, algorithm, *batch, frozen_norms) for algorithm in (rule, REFERENCE[rule])))
        for snn, batch in zip(networks, batches, strict=True)
    ]
    return {name: [row[name] for row in rows] for name in rows[0]}


Measured = dict[tuple[str, str, int], dict[str, list[Closeness]]]
"""By rule, kind of weights and T."""


def report(measured: Measured, title: str) -> str:
    """Markdown: the range of the means, all parameters together with their spread, and a table a rule."""
    rules, kinds, steps = (list(dict.fromkeys(key[i] for key in measured)) for i in range(3))
    # of one step both are the same by construction, which the first table shows
    columns = [(kind, t) for kind in kinds for t in steps if t > 1 or len(steps) == 1]
    meaning = "Cosine (and length in units of BPTT's)"
    parts = [title, _ranges(measured, rules, kinds)]
    rows = [
        [rule, kind, *(_with_spread(measured[rule, kind, t][ALL]) for t in steps)] for rule in rules for kind in kinds
    ]
    parts.append(f"## {ALL.capitalize()}\n\n{meaning}, mean ± standard deviation over seeds.")
    parts.append(_table(["rule", "weights", *(f"T = {t}" for t in steps)], rows, left=2))
    for rule in rules:
        names = [name for name in measured[(rule, *columns[0])] if name != ALL]
        rows = [[name, *(_means(measured[(rule, *column)][name]) for column in columns)] for name in names]
        parts.append(f"## {rule}, by weight\n\n{meaning}, means over seeds.")
        parts.append(_table(["weight", *(f"{kind}, T = {t}" for kind, t in columns)], rows))
    return "\n\n".join(parts) + "\n"


def _mean(values: list[Closeness]) -> Closeness:
    return Closeness(*(statistics.mean(numbers) for numbers in zip(*values, strict=True)))


def _means(values: list[Closeness]) -> str:
    mean = _mean(values)
    return NONE if math.isnan(mean.cosine) else f"{mean.cosine:.3f} ({mean.ratio:.2f})"


def _with_spread(values: list[Closeness]) -> str:
    mean = _mean(values)
    spread = [statistics.stdev(numbers) if len(numbers) > 1 else 0.0 for numbers in zip(*values, strict=True)]
    return f"{mean.cosine:.3f} ± {spread[0]:.3f} ({mean.ratio:.2f} ± {spread[1]:.2f})"


def _ranges(measured: Measured, rules: list, kinds: list) -> str:
    """A sentence for each rule and kind of weights."""
    lines = []
    for rule in rules:
        for kind in kinds:
            found = {t: rows for (*key, t), rows in measured.items() if key == [rule, kind]}
            means = {(name, t): _mean(values) for t, rows in found.items() for name, values in rows.items()}
            whole = [means.pop((ALL, t)) for t in found]
            name, t = min(means, key=lambda key: (math.isnan(means[key].cosine), means[key].cosine))
            lines.append(
                f"- {rule}, {kind}: the whole gradient has a cosine of {min(w.cosine for w in whole):.2f} to "
                f"{max(w.cosine for w in whole):.2f} with BPTT's and {min(w.ratio for w in whole):.2f} to "
                f"{max(w.ratio for w in whole):.2f} times its length; the least cosine of a weight is "
                f"{means[name, t].cosine:.2f} ({name}, T = {t})."
            )
    return "\n".join(lines)


def _table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def fresh(snn: SpikingNetwork, seed: int) -> SpikingNetwork:
    """The same network with weights that are drawn anew."""
    torch.manual_seed(seed)
    return build_snn(snn.spec).to(next(snn.parameters()))


def with_weights(snn: SpikingNetwork, weights: str) -> SpikingNetwork:
    """The same network with the weights of a file.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or its weights do not fit.
    """
    other = build_snn(snn.spec)
    load_weights(other, weights)
    return other.to(next(snn.parameters()))


def batches_of(snn: SpikingNetwork, root: str | None, batch: int, count: int) -> list[Batch]:
    """Batches of training images, normalised as the network's file says; the digits of scikit-learn without a root."""
    extra = snn.spec["extra"]
    pre = Preprocessing(input_size=tuple(extra["input_size"]), mean=tuple(extra["mean"]), std=tuple(extra["std"]))
    some = DataConfig(max_train_samples=batch * count, max_eval_samples=1)
    config = dataclasses.replace(some, name="folder", root=root) if root else some
    loader = torch.utils.data.DataLoader(load_data(config, pre).train, batch, shuffle=False)
    dtype = next(snn.parameters()).dtype
    return [(images.to(dtype), labels) for images, labels in loader]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved spiking network, e.g. runs/x/student")
    parser.add_argument("--fresh", action="store_true", help="also the same network with weights drawn anew")
    parser.add_argument("--weights", help="also the same network with the weights of this safetensors file")
    parser.add_argument("--frozen-norms", action="store_true", help="batch norms take their running statistics")
    parser.add_argument("--root", help="folder with train/ and val/ (or tars); without it, scikit-learn's digits")
    parser.add_argument("--algorithms", nargs="+", default=list(REFERENCE), choices=list(REFERENCE))
    parser.add_argument("--timesteps", nargs="+", type=int, default=[2, 4, 6, 8])
    parser.add_argument("--batch", type=int, default=32, help="images of a batch")
    parser.add_argument("--seeds", type=int, default=3, help="how many: a batch, and fresh weights, each")
    parser.add_argument("--float32", action="store_true", help="not float64; roundings flip spikes then")
    parser.add_argument("--out", help="Markdown file to write; printed in any case")
    args = parser.parse_args()

    snn = load_snn(args.model)
    if "extra" not in snn.spec:
        parser.error(f"{args.model}: config.json does not say how its images were normalised (no entry 'extra')")
    dtype = torch.float32 if args.float32 else torch.float64
    started, trained = time.perf_counter(), snn.to(dtype).timesteps
    batches = batches_of(snn, args.root, args.batch, args.seeds)
    kinds = {"fresh": [fresh(snn, seed) for seed in range(len(batches))]} if args.fresh else {}
    if args.weights:
        kinds["given"] = [with_weights(snn, args.weights)] * len(batches)
    kinds["trained"] = [snn] * len(batches)
    measured: Measured = {}
    for rule, kind, steps in itertools.product(args.algorithms, kinds, args.timesteps):
        for network in kinds[kind]:
            network.timesteps = steps
        measured[rule, kind, steps] = measure(kinds[kind], rule, batches, args.frozen_norms)
        print(f"{rule}, {kind}, T = {steps}: {_with_spread(measured[rule, kind, steps][ALL])}", flush=True)
    numbers = str(dtype).removeprefix("torch.") + ", running statistics" * args.frozen_norms
    packages = ", ".join(f"{name} {value}" for name, value in versions().items())
    title = f"""# Rate-based gradients beside those of backpropagation through time

{snn.spec.get("name", "twin")}, trained with {snn.spec["algorithm"]} at T = {trained}; {len(batches)} seeds, a batch of
{args.batch} training images each, {numbers}; {torch.get_num_threads()} thread(s) of
{cpu()["cpu"]}, {time.perf_counter() - started:.0f} s, {datetime.date.today()}; {packages}."""
    text = report(measured, title)
    print(text)
    if args.out:
        Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
