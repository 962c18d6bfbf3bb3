"""Training steps of the study's rows side by side: time in turns, peak memory each in a process of its own.

    python -m benchmarks.study.timing --precision no --threads 1

A step is zero_grad, forward, loss, backward and the optimizer's move, with the network, the losses and the optimizer
that a run of the row has, made from its command line; on random images and labels, with a small learning rate.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.plan import EAGER_TO_RETURN, LARGE, SMALL
from benchmarks.study.rows import ROWS, network_of
from benchmarks.study.running import COMMON, REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results" / "study"
MEMORY_STEPS = 3
"""Of a process whose peak memory counts; where taps are drawn, so many for each tap."""


@dataclass(frozen=True)
class Kind:
    """A kind of step.

    Args:
        row: whose it is.
        stage: of the row's schedule.
    """

    row: str
    stage: int = 0


KINDS: dict[str, Kind] = {
    "scratch": Kind("scratch"),
    "kd": Kind("kd"),
    "joint": Kind("joint"),
    **{f"progressive, up to layer{number + 1}": Kind("progressive", number) for number in range(3)},
    "progressive, whole student": Kind("progressive", 3),
    "stochastic": Kind("stochastic"),
    "bptt": Kind("bptt"),
    "tet": Kind("tet"),
}
"""By what the table calls them."""


class Step:
    """The training step of a row, with networks and an optimizer of its own.

    Args:
        name: of `KINDS`.
        batch: images a step.
    """

    def __init__(self, name: str, batch: int, options: argparse.Namespace) -> None:
        import torch
        from accelerate import Accelerator

        from distill.optimizers import make_optimizer
        from distill.preparation import freeze_norms

        torch.manual_seed(0)
        self.name = name
        self.images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch,))
        self.accelerator = Accelerator(cpu=True, mixed_precision=options.precision)
        config = _config(KINDS[name].row, options)
        make = _standalone if ROWS[KINDS[name].row].script == "train_snn" else _distilled
        model, self.backward, self.draws = make(config, KINDS[name].stage, self.images)
        model = model.to(memory_format=torch.channels_last).train()
        if config.train.freeze_norms:
            freeze_norms(getattr(model, "student", model))  # not those of adapters
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model, config.train))

    def step(self, number: int) -> float:
        """In seconds."""
        started = time.perf_counter()
        self.optimizer.zero_grad()
        self.backward(self.accelerator, self.model, self.images, self.labels, number)
        self.optimizer.step()
        return time.perf_counter() - started


def _config(row: str, options: argparse.Namespace) -> Any:
    from distill import cli
    from distill.config import DistillConfig, SnnTrainingConfig

    values = {f"{ROWS[row].network}.{name}": value for name, value in network_of(options.width).items()}
    values["train.lr"] = "0.001"
    values["data.root"] = "."  # nothing is read there, but without one the configuration would be refused
    words = [word for name, value in (values | ROWS[row].arguments).items() for word in (f"--{name}", value)]
    kind: type = SnnTrainingConfig if ROWS[row].script == "train_snn" else DistillConfig
    return cli.parse(kind, ["--config", str(REPOSITORY / COMMON), *words]).config


def _standalone(config: Any, stage: int, images: Any) -> tuple[Any, Any, int]:
    """Model, forward and backward pass, and how many taps are drawn from."""
    from distill.snn_training import backward_of
    from distill.students import make_student
    from distill.teachers import build_teacher, teacher_preprocessing

    ann = build_teacher(config.ann, 10)
    snn = make_student(config.student, ann, 10, images[:2], teacher_preprocessing(config.ann, "ann"))
    return snn, backward_of(config.loss, config.student.algorithm, config.student.timesteps), 1


def _distilled(config: Any, stage: int, images: Any) -> tuple[Any, Any, int]:
    from distill.distillation import make_distiller
    from distill.losses import distillation_losses
    from distill.schedules import hybrid_backward, prepare_stage, stages_of
    from distill.teachers import build_teacher, teacher_preprocessing

    teacher = build_teacher(config.teacher, 10)
    distiller = make_distiller(config, teacher, images[:2], teacher_preprocessing(config.teacher), say=False)
    chosen = stages_of(config.schedule, [tap.name for tap in distiller.taps], config.train.epochs)[stage]
    prepare_stage(distiller, chosen, images[:2], config.schedule.freeze)
    backward = hybrid_backward(chosen, lambda outputs, labels: distillation_losses(outputs, labels, config.loss), 0)
    return distiller, backward, len(chosen.taps) if chosen.draw else 1


def times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each kind's steps, which take turns."""
    from benchmarks.distillation_step import alternate

    steps: list[Any] = [Step(name, options.batch, options) for name in options.steps]
    return alternate(steps, options.rounds, options.warmup)


def memory(options: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Peak memory in MB of each kind's process, a small and a large batch a round; the kinds take turns."""
    found: dict[str, list[list[float]]] = {name: [] for name in options.steps}
    for _ in range(options.memory_rounds):
        for name in options.steps:
            found[name].append(_peaks(name, options))
    return found


def _peaks(name: str, options: argparse.Namespace) -> list[float]:
    peaks = []
    for batch in options.memory_batches:
        words = [sys.executable, "-m", "benchmarks.study.timing", "--child", name, "--batch", str(batch)]
        words += ["--precision", options.precision, "--width", str(options.width)]
        words += [] if options.threads is None else ["--threads", str(options.threads)]
        words += [] if options.compiled else ["--no-compile"]
        done = subprocess.run(words, cwd=REPOSITORY, env=os.environ | EAGER_TO_RETURN, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{name} with a batch of {batch}: {done.stderr[-2000:]}")
        peaks.append(json.loads(done.stdout)["peak_mb"])
        print(f"{name}, batch {batch}: {peaks[-1]:.0f} MB", file=sys.stderr, flush=True)
    return peaks


def child(options: argparse.Namespace) -> float:
    """Runs a few steps; the peak memory of this process, in MB."""
    import torch

    from benchmarks.measure import peak_memory_mb

    step = Step(options.child, options.batch, options)
    for number in range(MEMORY_STEPS * step.draws):
        step.step(number)
    return peak_memory_mb(torch.device("cpu"))


def slopes(rounds: Sequence[Sequence[float]], batches: Sequence[int]) -> list[float]:
    """MB that one more image of a batch adds, in each round."""
    return [(peaks[1] - peaks[0]) / (batches[1] - batches[0]) for peaks in rounds]


def ratios(
    seconds: Mapping[str, Sequence[float]], peaks: Mapping[str, Sequence[Sequence[float]]], batches: Sequence[int]
) -> dict[str, float]:
    """Of rate_m to BPTT, both from scratch: the medians of the rounds' ratios, of time and of memory an image."""
    found = {}
    if {"scratch", "bptt"} <= seconds.keys():
        pairs = zip(seconds["scratch"], seconds["bptt"], strict=True)
        found["time"] = statistics.median(own / other for own, other in pairs)
    if {"scratch", "bptt"} <= peaks.keys():
        slopes_of = {name: slopes(peaks[name], batches) for name in ("scratch", "bptt")}
        found["memory"] = statistics.median(a / b for a, b in zip(slopes_of["scratch"], slopes_of["bptt"], strict=True))
    return found


def markdown(result: Mapping[str, Any]) -> str:
    from benchmarks.distillation_step import spread
    from benchmarks.study.cells import NONE, rows_text
    from benchmarks.study.comparing import OF_BPTT_MEMORY, OF_BPTT_TIME

    seconds, peaks, batches = result["seconds"], result["peaks_mb"], result["memory_batches"]
    body = []
    for name in dict.fromkeys([*seconds, *peaks]):
        cells = [name, NONE, NONE, NONE]
        if name in seconds:
            own = seconds[name]
            cells = [name, spread([1000 * t for t in own], 0), f"{result['batch'] / statistics.median(own):.1f}", NONE]
            if "scratch" in seconds:
                cells[3] = spread([a / b for a, b in zip(own, seconds["scratch"], strict=True)], 2)
        more = [_around(each, 0) for each in zip(*peaks[name], strict=True)] if name in peaks else []
        more += [_around(slopes(peaks[name], batches), 2)] if name in peaks else []
        body.append([*cells, *(more or [NONE] * 3)])
    head = ["step", "time (ms)", "images/s", "x scratch", *(f"peak at {batch} (MB)" for batch in batches), "MB/image"]
    said = [
        f"rate_m takes {result['ratios'][name]:.3f} of BPTT's {name}{what} (target: at most {most})."
        for name, what, most in (("time", "", OF_BPTT_TIME), ("memory", " an image", OF_BPTT_MEMORY))
        if name in result["ratios"]
    ]
    about = (
        "Times are medians of steps taken in turns, with quartiles; *x scratch* is the ratio to the step of `scratch` "
        "in the same round. *Peak* is the largest resident memory of a process that takes that step alone, with "
        + " ".join(f"`{name}={value}`" for name, value in EAGER_TO_RETURN.items())
        + "; *MB/image* its slope between the two batches; medians, least and most of the rounds. A megabyte is 10^6 "
        "bytes."
    )
    return (
        "\n\n".join(["# Training steps of the study", result["settings"], about, rows_text(head, body), *said]) + "\n"
    )


def _around(values: Sequence[float], digits: int) -> str:
    """The median and, where they differ, least and most: of so few rounds quartiles say no more."""
    shown, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return shown if low == high else f"{shown} [{low}, {high}]"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="benchmarks.study.timing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--steps", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="STEP", help=f"of {list(KINDS)}")
    add("--batch", type=int, default=32, help="images of a timed step")
    add("--memory-batches", type=int, nargs=2, default=[SMALL, LARGE], help="images of the steps of the memory rows")
    add("--width", type=int, default=32, help="channels of the first stage")
    add("--precision", choices=("no", "bf16"), default="bf16")
    add("--threads", type=int)
    add("--no-compile", dest="compiled", action="store_false", help="run the fused passes as they are written")
    add("--warmup", type=int, default=2, help="rounds before the timed ones")
    add("--rounds", type=int, default=10, help="timed rounds, at least 2; 0 for memory alone")
    add("--memory-rounds", type=int, default=3, help="processes for each peak of memory")
    add("--no-memory", dest="memory", action="store_false", help="times alone")
    add("--results", type=Path, default=RESULTS, metavar="DIR")
    add("--child", choices=list(KINDS), help=argparse.SUPPRESS)
    return made


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if options.rounds == 1 or options.rounds < 0:
        parser().error(f"--rounds must be 0, or at least 2 for quartiles, found {options.rounds}")
    small, large = options.memory_batches
    if not 2 <= small < large:  # taps are checked on two images
        parser().error(f"--memory-batches must be a smaller and a larger number, at least 2, found {small} {large}")
    if options.memory_rounds < 1:
        parser().error(f"--memory-rounds must be at least 1, found {options.memory_rounds}")
    if options.batch < 2:
        parser().error(f"--batch must be at least 2, found {options.batch}")
    # before PyTorch is imported: the peak memory of a child starts at that of its parent
    peaks = {} if options.child or not options.memory else memory(options)
    import torch

    import models
    from distill.report import versions
    from models.compiling import is_compiling

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    models.compile_kernels(options.compiled)
    torch.set_flush_denormal(True)  # as the scripts do (`distill.cli.run`)
    if options.child:
        with contextlib.redirect_stdout(sys.stderr):  # a library that prints must not add to the one line
            peak = child(options)
        print(json.dumps({"peak_mb": peak}))
        return
    seconds = times(options) if options.rounds else {}
    packages = ", ".join(f"{name} {value}" for name, value in versions().items())
    precision = {"no": "float32", "bf16": "bfloat16"}[options.precision]
    result = {
        "settings": f"ResNet-18 of width {options.width}, 32x32 images, T = 4, batch {options.batch}, {precision}, "
        f"fused passes {'compiled' if options.compiled and is_compiling() else 'as written'}; {options.warmup} + "
        f"{options.rounds} rounds, {options.memory_rounds if peaks else 0} of memory; {machine.cpu()['cpu']}, "
        f"{torch.get_num_threads()} thread(s); "
        f"{datetime.date.today()}; commit {machine.commit(REPOSITORY)}; {packages}.",
        "width": options.width,
        "batch": options.batch,
        "memory_batches": options.memory_batches,
        "ratios": ratios(seconds, peaks, options.memory_batches),
        "seconds": seconds,
        "peaks_mb": peaks,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"timing_{options.precision}.json"
    file.write_text(json.dumps(result) + "\n")
    file.with_suffix(".md").write_text(markdown(result))
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
