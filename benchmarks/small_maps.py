"""Milliseconds of convolutions of small maps: PyTorch's own, and as products of matrices (`models.small_maps`).

    python -m benchmarks.small_maps --precision bf16 --threads 1

Kernels of 3 x 3 in channels_last; the forward pass of the T steps of a batch, both gradients of the batch. Each is the
median of calls that take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.machine import cpu
from distill.report import versions
from models import small_maps

LAYERS = (
    *((64, 64, 4, 1), (128, 128, 4, 1), (128, 256, 8, 2), (256, 256, 4, 1), (256, 512, 8, 2), (512, 512, 4, 1)),
    *((512, 512, 2, 1), (256, 256, 3, 1)),
)
"""Channels in and out, pixels a side, stride."""


FORWARD = (F.conv2d, small_maps.convolve)
BACKWARD = (torch.ops.aten.convolution_backward, small_maps.convolution_backward)


def in_turns(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 2):  # the first two fill caches
        for call, found in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            if repeat > 1:
                found.append(1000 * (time.perf_counter() - started))
    return [statistics.median(found) for found in times]


def row(layer: tuple[int, int, int, int], dtype: torch.dtype, steps: int, batch: int, repeats: int) -> str:
    channels, out, size, stride = layer

    def maps(images: int, channels: int, size: int) -> torch.Tensor:
        return torch.randn(images, channels, size, size).to(dtype).to(memory_format=torch.channels_last)

    stream, rate, grad = (
        maps(steps * batch, channels, size),
        maps(batch, channels, size),
        maps(batch, out, size // stride),
    )
    weight = maps(out, channels, 3)
    geometry = ([stride] * 2, [1, 1], [1, 1])
    cells = in_turns([lambda f=f: f(stream, weight, None, *geometry, 1) for f in FORWARD], repeats)  # type: ignore[misc]
    for needed in ([True, False, False], [False, True, False]):
        arguments = (grad, rate, weight, None, *geometry, False, [0, 0], 1, needed)
        cells += in_turns([lambda f=f, a=arguments: f(*a) for f in BACKWARD], repeats)  # type: ignore[misc]
    return f"| {channels} | {out} | {size} | {stride} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--all", action="store_true", help="products wherever maps are small, faster or not")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.all:
        small_maps.PAIRS = small_maps.PAIRS_OF_WEIGHT = 0
        small_maps.PIXELS_FORWARD = small_maps.PIXELS
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    packages = ", ".join(f"{name} {value}" for name, value in versions().items())
    print(f"{cpu()['cpu']}, {args.threads} threads; {packages}")
    print(f"{args.precision}, T = {args.timesteps}, batch {args.batch}\n")
    titles = (
        "channels in",
        "out",
        "pixels a side",
        "stride",
        "forward",
        "ours",
        "of the input",
        "ours",
        "of the weight",
    )
    print(f"| {' | '.join((*titles, 'ours'))} |\n|{' ---: |' * 10}")
    for layer in LAYERS:
        print(row(layer, dtype, args.timesteps, args.batch, args.repeats), flush=True)


if __name__ == "__main__":
    main()
