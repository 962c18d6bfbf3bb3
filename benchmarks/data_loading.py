"""Milliseconds to load a batch, loading alone: no network, no device.

    python -m benchmarks.data_loading --batch 128

Images of noise in memory, with CIFAR-10's augmentation (crop of 4 pixels' padding, flip), and as evaluation sees them.
One thread; the median of some passes, and the fastest.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from benchmarks.machine import cpu
from distill.data import DataConfig, ImageSet, Preprocessing, train_loader
from distill.data.transforms import EvalTransform, Transform, train_transform
from distill.report import versions

CASES = {
    "normalise": None,
    "crop, flip": DataConfig(crop_padding=4, hflip=0.5),
    "crop, flip, rand-m9": DataConfig(crop_padding=4, hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1"),
}


def milliseconds(transform: Transform, size: int, batch: int, images: int, passes: int) -> list[float]:
    """Time per batch of each pass over `images` images of size x size pixels."""
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
    dataset = ImageSet(pixels, np.zeros(images, dtype=np.int64), transform, seed=0, in_memory=True)
    loader = train_loader(dataset, batch, seed=0, workers=0)
    found = []
    for _ in range(passes):
        started = time.perf_counter()
        for _ in loader:
            pass
        found.append(1000 * (time.perf_counter() - started) / len(loader))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=1280, help="images of a pass")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32], help="height and width of the images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    packages = ", ".join(f"{name} {value}" for name, value in versions().items())
    print(f"{cpu()['cpu']}; {packages}; batch {args.batch}, {args.passes} passes over {args.images} images\n")
    print("| pixels | augmentation | ms per batch, median | fastest |\n| ---: | --- | ---: | ---: |")
    for size in args.sizes:
        pre = Preprocessing(input_size=(3, size, size), mean=(0.5,) * 3, std=(0.25,) * 3)
        for name, config in CASES.items():
            transform = EvalTransform(pre) if config is None else train_transform(config, pre)
            found = milliseconds(transform, size, args.batch, args.images, args.passes)
            print(f"| {size} | {name} | {statistics.median(found):.2f} | {min(found):.2f} |", flush=True)


if __name__ == "__main__":
    main()
