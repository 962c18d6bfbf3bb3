"""What hybrids add to a training step: multiply-accumulates, time, and what the teacher's passes keep.

    python benchmarks/distillation_step.py --precision bf16 --out benchmarks/results/NAME.md

A ResNet-18 for small images teaches its spiking twin, with taps at layer1, layer2 and layer3. Four steps are compared:
labels alone (standalone), with the teacher's logits (logit KD), with all hybrids (joint), with one drawn for each step
(stochastic). The unit of cost is one forward pass of the analogue network on the same batch.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where benchmarks, models and distill are

import models
from benchmarks import machine
from benchmarks.distillation_cost import VARIANTS, Variant, equivalents, saved_by, teacher_graph
from distill.report import versions
from models.compiling import is_compiling

MB = 1e6
MOST_BEYOND_T = {"standalone": 2, "joint": 6, "stochastic": 4}
"""Forward passes of the analogue network that a step may cost, beyond the T of the spikes."""
MOST_TIME = {"joint": 1.5, "stochastic": 1.25}
"""Of a standalone step."""


def alternate(variants: Sequence[Variant], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each variant's steps, which take turns, so that what else the machine does slows all alike."""
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number, variant in itertools.product(range(-warmup, rounds), variants):
        seconds = variant.step(number + warmup)
        if number >= 0:
            times[variant.name].append(seconds)
    return times


def spread(values: Sequence[float], digits: int) -> str:
    """The median, with quartiles."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} [{first:.{digits}f}, {third:.{digits}f}]"


def contestants(options: argparse.Namespace) -> list[Variant]:
    """All variants, on the same random images and labels, with one teacher."""
    torch.manual_seed(0)
    size = (options.batch, 3, options.image_size, options.image_size)
    images = torch.randn(size).to(options.device, memory_format=torch.channels_last)
    labels = torch.randint(10, (options.batch,)).to(options.device)
    channels = [options.width * 2**stage for stage in range(4)]
    teacher = models.create_ann("resnet18", num_classes=10, cifar_stem=True, kwargs={"channels": channels})
    teacher.to(options.device, memory_format=torch.channels_last)
    return [Variant(name, teacher, images, labels, options.timesteps, options.precision) for name in VARIANTS]


def row(variant: Variant, times: dict[str, list[float]], timesteps: int) -> list[str]:
    """The cells of a variant; without times it has no columns for them."""
    cost = equivalents(variant)
    graphs = [teacher_graph(variant, active) for active in variant.draws]
    saved = statistics.mean(saved_by(variant, active) for active in variant.draws)
    most, name = MOST_BEYOND_T.get(variant.name), variant.name
    cells = [name, f"{statistics.mean(cost):.2f}" + (f" (up to {max(cost):.2f})" if len(cost) > 1 else "")]
    cells += ["-" if most is None else str(timesteps + most)]
    if times:
        ratios = [own / base for own, base in zip(times[name], times["standalone"], strict=True)]
        cells += [spread([1000 * t for t in times[name]], 0), spread(ratios, 2), str(MOST_TIME.get(name, "-"))]
    front = f"{max(g.front for g in graphs) / MB:.1f} / {max(len(g.front_modules) for g in graphs)}"
    return [*cells, f"{saved / MB:.1f}", front, f"{statistics.mean(g.behind for g in graphs) / MB:.1f}"]


def markdown(rows: Sequence[Sequence[str]], timed: bool, settings: str) -> str:
    head = ["step", "cost (forward passes)", "at most"]
    head += ["time (ms)", "x standalone", "at most"] if timed else []
    head += ["saved (MB)", "teacher in front of the taps (MB / modules)", "behind them (MB)"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    about = """Cost counts the multiply-accumulates of convolutions and matrix products, forward and backward, in
forward passes of the analogue network on the batch; of stochastic it is the mean over the taps, as are its megabytes.
Times are medians of steps taken in turns, with quartiles; ratios are those of steps of one round. *Saved* is what the
graph keeps without parameters; in front of the first active tap the teacher should keep nothing, no module a graph."""
    return "\n\n".join(["# A distillation step", settings, about, "\n".join(lines)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--timesteps", type=int, default=4, help="T")
    add("--batch", type=int, default=32, help="images a step")
    add("--image-size", type=int, default=32, help="pixels a side")
    add("--width", type=int, default=64, help="channels of the first stage")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 by autocast")
    add("--threads", type=int, help="threads (default: PyTorch's choice)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--no-compile", dest="compiled", action="store_false", help="run the fused passes as they are written")
    add("--warmup", type=int, default=4, help="rounds before the timed ones")
    add("--rounds", type=int, default=12, help="timed rounds, a step of each variant in each; 0 to count only")
    add("--out", type=Path, help="Markdown file to write; printed in any case")
    options = parser.parse_args()
    if options.rounds == 1 or options.rounds < 0:
        parser.error(f"--rounds must be 0, or at least 2 for quartiles, found {options.rounds}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    models.compile_kernels(options.compiled)
    made = contestants(options)
    times = alternate(made, options.rounds, options.warmup) if options.rounds else {}
    compiled = is_compiling()
    rows = [row(variant, times, options.timesteps) for variant in made]
    cpu = machine.cpu()["cpu"] if options.device == "cpu" else torch.cuda.get_device_name()
    packages = ", ".join(f"{name} {value}" for name, value in versions().items())
    settings = f"""ResNet-18 of width {options.width}, {options.image_size}x{options.image_size} images, T = \
{options.timesteps}, batch {options.batch}, {options.precision}, fused passes \
{"compiled" if compiled else "as written"}; {options.warmup} + {options.rounds} rounds; {cpu}, \
{torch.get_num_threads()} thread(s); {datetime.date.today()}; {packages}."""
    text = markdown(rows, bool(times), settings)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
