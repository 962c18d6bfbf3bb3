"""How good a calibrated spiking twin is before any training.

    python benchmarks/calibration.py --data DIR --out benchmarks/results/NAME.md

DIR holds cifar10/train.tar and test.tar, imagenet_sample/val.tar and the weights teachers/*.safetensors. Calibration
images are of the training set of CIFAR-10, and photos that are not evaluated of the ImageNet sample.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import cpu
from distill.data import DataConfig, Preprocessing, load_data
from distill.report import versions
from models import NeuronConfig, create_ann, load_weights, spiking_twin
from models.calibration import calibrate

CIFAR = Preprocessing(input_size=(3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
PHOTOS = Preprocessing(input_size=(3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
OPTIONS: dict[str, dict | None] = {
    "uncalibrated": None,
    "percentile 99.9": dict(percentile=99.9),
    "search": dict(),
    "search, norms recalibrated": dict(recalibrate=True),
}


@torch.no_grad()
def predictions(network: nn.Module, images: Tensor, batch: int = 50) -> Tensor:
    return torch.cat([network(part).argmax(1) for part in images.split(batch)])


def measure(
    ann: nn.Module, images: Tensor, test: Tensor, expected: Tensor, cases: list[tuple[float, int, str]]
) -> Iterator[str]:
    """A line of a table for each case (leak, T, option): agreement with the labels `expected`, in percent."""
    for leak, timesteps, option in cases:
        twin = spiking_twin(ann, timesteps, NeuronConfig(leak=leak), input_size=(3, *images.shape[2:])).eval()
        started = time.perf_counter()
        if (arguments := OPTIONS[option]) is not None:
            calibrate(ann, twin, images.split(64), **arguments)
        seconds = time.perf_counter() - started
        agreement = 100 * (predictions(twin, test) == expected).double().mean().item()
        line = f"| {leak} | {timesteps} | {option} | {agreement:.1f} | {seconds:.0f} |"
        print(line, flush=True)
        yield line


def converted(ann: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """SpikingJelly's converter, integrate-and-fire, with its thresholds at percentile 99.9 on images (B, C, H, W)."""
    from spikingjelly.activation_based import ann2snn

    recipe = ann2snn.RateCodingRecipe(dataloader=[(part, None) for part in batches], mode="99.9%")
    return ann2snn.Converter(recipe).convert(ann).eval()


@torch.no_grad()
def logits_after(network: nn.Module, images: Tensor, steps: Sequence[int]) -> dict[int, Tensor]:
    """The mean logits (B, K) of a converted network after each of these numbers of steps, all of one pass."""
    from spikingjelly.activation_based import functional

    functional.reset_net(network)
    found, total = {}, torch.zeros(())
    for step in range(1, max(steps) + 1):
        total = total + network(images)
        if step in steps:
            found[step] = total / step
    return found


def spikingjelly(ann: nn.Module, images: Tensor, test: Tensor, expected: Tensor, steps: list[int]) -> Iterator[str]:
    """A line of a table for each number of steps of SpikingJelly's converted network."""
    network = converted(ann, images.split(64))
    correct = dict.fromkeys(steps, 0)
    for part, labels in zip(test.split(50), expected.split(50), strict=True):
        for step, logits in logits_after(network, part, steps).items():
            correct[step] += int((logits.argmax(1) == labels).sum())
    for step, count in correct.items():
        line = f"| 1.0 | {step} | SpikingJelly's converter, 99.9 % | {100 * count / len(test):.1f} | |"
        print(line, flush=True)
        yield line


def cifar(data: Path, count: int, limit: int) -> str:
    kwargs = {"channels": [32, 64, 128, 256]}
    ann = create_ann("resnet18", 10, cifar_stem=True, kwargs=kwargs)
    load_weights(ann, data / "teachers/resnet18_w32_cifar10.safetensors")
    config = DataConfig(
        name="folder", root=str(data / "cifar10"), eval_split="test", max_train_samples=count, max_eval_samples=limit
    )
    splits = load_data(config, CIFAR)
    images = torch.stack([splits.train[i][0] for i in range(len(splits.train))])
    test = torch.stack([splits.eval[i][0] for i in range(len(splits.eval))])
    labels = torch.tensor([splits.eval[i][1] for i in range(len(splits.eval))])
    teacher = 100 * (predictions(ann.eval(), test) == labels).double().mean().item()
    cases = [(leak, 4, option) for leak in (0.2, 1.0) for option in OPTIONS]
    cases += [(1.0, timesteps, option) for timesteps in (8, 16, 32) for option in ("uncalibrated", "search")]
    lines = [*measure(ann, images, test, labels, cases), *spikingjelly(ann, images, test, labels, [4, 8, 16, 32])]
    return f"""## ResNet-18 of width 32, CIFAR-10 (JPEG q75)

Top-1 in percent on {limit} test images (teacher: {teacher:.1f}); calibrated on {count} training images.

| leak | T | option | top-1 | calibration, s |
| ---: | ---: | --- | ---: | ---: |
""" + "\n".join(lines)


def photos(data: Path, count: int, limit: int) -> str:
    ann = create_ann("tf_efficientnet_lite0", 1000)
    load_weights(ann, data / "teachers/efficientnet_lite0.safetensors")
    config = DataConfig(name="folder", root=str(data / "imagenet_sample"), train_split="val", max_train_samples=1)
    splits = load_data(config, PHOTOS)
    chosen = torch.randperm(len(splits.eval), generator=torch.Generator().manual_seed(0))[: count + limit].tolist()
    both = torch.stack([splits.eval[i][0] for i in chosen])
    images, test = both[:count], both[count:]
    teacher = predictions(ann.eval(), test)
    cases = [(leak, 4, option) for leak in (0.2, 1.0) for option in OPTIONS if option != "percentile 99.9"]
    return f"""## EfficientNet-Lite0, photos of the ImageNet sample

Top-1 agreement with the teacher in percent on {limit} photos (chance: 0.1); calibrated on {count} others.

| leak | T | option | agreement | calibration, s |
| ---: | ---: | --- | ---: | ---: |
""" + "\n".join(measure(ann, images, test, teacher, cases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--networks", nargs="+", default=["cifar", "photos"], choices=["cifar", "photos"])
    parser.add_argument("--calibrate", nargs=2, type=int, default=[128, 48], help="images, of CIFAR-10 and photos")
    parser.add_argument("--test", nargs=2, type=int, default=[1000, 100], help="images, of CIFAR-10 and photos")
    parser.add_argument("--out", type=Path, help="Markdown file to write; printed in any case")
    args = parser.parse_args()
    torch.manual_seed(0)
    tables = []
    for index, (name, function) in enumerate((("cifar", cifar), ("photos", photos))):
        if name in args.networks:
            tables.append(function(args.data, args.calibrate[index], args.test[index]))
    packages = ", ".join(f"{name} {value}" for name, value in versions().items())
    text = "\n\n".join(
        [
            "# Spiking twins after calibration, before any training",
            f"Evaluation, float32, {torch.get_num_threads()} thread(s), {cpu()['cpu']}, {datetime.date.today()};\n"
            f"{packages}.",
            *tables,
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
