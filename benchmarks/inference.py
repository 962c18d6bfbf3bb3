"""Images per second in inference: the teacher, its spiking twin and the forms that scripts/export.py writes.

    python -m benchmarks.inference --timesteps 1 4 --batches 1 64 --out benchmarks/results/NAME.md

Each row is a process of its own and one JSON line. Weights are random: no pass looks at the numbers, so that they have
no part in the time. A form whose packages are missing, or that this version does not have, is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where benchmarks, models and distill are

from benchmarks import machine

NETWORKS: dict[str, dict[str, Any]] = {
    "digits": {"channels": [16, 32, 64, 128], "size": (1, 16, 16)},  # configs/digits.yaml
    "resnet18": {"channels": [64, 128, 256, 512], "size": (3, 32, 32)},  # configs/cifar10_resnet18.yaml, timm's width
}
EXPORTED = {"spikingjelly": "spikingjelly_code", "torch_export": "torch_program", "onnx": "onnx_file"}
"""Forms of scripts/export.py and their modules in distill.export."""
FORMS = ("teacher", "twin", "twin_compiled", "twin_steps", *EXPORTED)
LEFT_OUT = 3
"""Exit status of a row whose form is not there."""


class FormMissing(Exception):
    """This form cannot be measured here; says why."""


def measure(
    network: str, form: str, timesteps: int, batch: int, threads: int, repeats: int, warmup: int = 2
) -> dict[str, Any]:
    """One row, in this process, in float32 on the CPU.

    Args:
        network: one of `NETWORKS`.
        form: one of `FORMS`. twin_compiled: with fused passes compiled; twin_steps: a step at a time, all T of them.
        timesteps: T; without effect on the teacher.
        batch: images of a pass.
        repeats: timed passes, after `warmup` others.

    Raises:
        FormMissing: if the form's package or module is not installed.
    """
    import torch

    import models
    from benchmarks.measure import peak_memory_mb
    from distill.report import versions

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    size = NETWORKS[network]["size"]
    teacher = models.create_ann(
        "resnet18", 10, size[0], cifar_stem=True, kwargs={"channels": NETWORKS[network]["channels"]}
    )
    images = torch.randn(batch, *size)
    run = _form(form, teacher.eval(), timesteps, images)
    seconds = []
    with torch.no_grad():
        for _ in range(warmup + repeats):
            began = time.perf_counter()
            logits = run(images)
            seconds.append(time.perf_counter() - began)
    assert logits.shape == (batch, 10)
    first, median, third = statistics.quantiles(seconds[warmup:], n=4, method="inclusive")
    return {
        "network": network, "form": form, "timesteps": None if form == "teacher" else timesteps, "batch": batch,
        "images_per_second": batch / median, "ms": 1000 * median, "ms_quartile_1": 1000 * first,
        "ms_quartile_3": 1000 * third, "peak_mb": peak_memory_mb(torch.device("cpu")), "repeats": repeats,
        "threads": threads, "versions": versions() | _runtime(form) | machine.cpu(),
    }  # fmt: skip


def _form(form: str, teacher: Any, timesteps: int, images: Any) -> Callable[[Any], Any]:
    """What is called on the images (B, C, H, W)."""
    import torch

    import models

    if form == "teacher":
        return teacher.to(memory_format=torch.channels_last)
    twin = models.spiking_twin(teacher, timesteps, input_size=tuple(images.shape[1:])).eval()
    if form in EXPORTED:
        return _exported(form, twin)
    models.compile_kernels(form == "twin_compiled")
    twin = twin.to(memory_format=torch.channels_last)
    if form == "twin_steps":
        return lambda images: list(twin.steps(images))[-1]
    return twin


def _exported(form: str, twin: Any) -> Callable[[Any], Any]:
    """The network that the export's own reader gives back; whether the check passed is for scripts/export.py to say."""
    import torch

    try:
        module = importlib.import_module(f"distill.export.{EXPORTED[form]}")
        from distill.export import ExportConfig, Job
    except ImportError as error:
        raise FormMissing(f"{form}: {error}") from error
    size = tuple(twin.spec["input_size"])
    with tempfile.TemporaryDirectory() as folder:
        config = ExportConfig(model="benchmark", out=folder, format=form)  # type: ignore[arg-type]
        try:
            module.export(Job(network=twin, samples=torch.randn(8, *size), folder=Path(folder), config=config))
        except ValueError as error:  # names the package that is missing
            raise FormMissing(f"{form}: {error}") from error
        return module.load(Path(folder))


def _runtime(form: str) -> dict[str, str]:
    if form != "onnx":
        return {}
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__}


def report(rows: Sequence[dict[str, Any]], left_out: Sequence[str], command: str) -> str:
    """The rows as Markdown, each with its speed as a multiple of the teacher's at the same batch."""
    first = rows[0]
    versions: dict[str, Any] = {}
    for row in rows:
        versions |= row["versions"]
    teachers = {(r["network"], r["batch"]): r["images_per_second"] for r in rows if r["form"] == "teacher"}
    lines = [
        "# Images per second in inference",
        "",
        f"`{command}`",
        "",
        f"{datetime.date.today()}; float32 on the CPU, {first['threads']} thread(s); "
        + ", ".join(f"{name} {value}" for name, value in versions.items())
        + ".",
        f"Median of {first['repeats']} passes with quartiles, each row in a process of its own; the peak is that of",
        "the whole process, loading and exporting included. Random weights.",
        "",
        "| network | form | T | batch | ms a pass | quartiles | images/s | x teacher | peak (MB) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        teacher = teachers.get((row["network"], row["batch"]))
        ratio = f"{row['images_per_second'] / teacher:.3f}" if teacher else "-"
        lines.append(
            f"| {row['network']} | {row['form']} | {row['timesteps'] or '-'} | {row['batch']} | {row['ms']:.2f} | "
            f"{row['ms_quartile_1']:.2f} to {row['ms_quartile_3']:.2f} | {row['images_per_second']:.1f} | {ratio} | "
            f"{row['peak_mb']:.0f} |"
        )
    lines += ["", *(f"Left out: {reason}" for reason in left_out)] if left_out else []
    return "\n".join(lines) + "\n"


def plan(options: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """Network, form, T and batch of each row; the teacher has one row for all T."""
    return [
        (network, form, steps, batch)
        for network in options.networks
        for batch in options.batches
        for form in options.forms
        for steps in (options.timesteps[:1] if form == "teacher" else options.timesteps)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    add("--forms", nargs="+", choices=FORMS, default=FORMS)
    add("--timesteps", nargs="+", type=int, default=(1, 4), help="T")
    add("--batches", nargs="+", type=int, default=(1, 64), help="images of a pass")
    add("--threads", type=int, default=2)
    add("--repeats", type=int, default=20, help="timed passes, at least 2")
    add("--out", type=Path, help="a Markdown file; rows are kept beside it as .jsonl, and measured once")
    add("--child", nargs=4, metavar=("NETWORK", "FORM", "T", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        network, form, steps, batch = options.child
        try:
            with contextlib.redirect_stdout(sys.stderr):  # a library that prints must not add to the one line
                row = measure(network, form, int(steps), int(batch), options.threads, options.repeats)
        except FormMissing as missing:
            print(missing)
            sys.exit(LEFT_OUT)
        print(json.dumps(row))
        return
    kept = options.out.with_suffix(".jsonl") if options.out else None
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept and kept.exists() else []
    known = {(row["network"], row["form"], row["timesteps"], row["batch"]) for row in rows}
    left_out: dict[str, None] = {}
    for network, form, steps, batch in plan(options):
        if (network, form, None if form == "teacher" else steps, batch) in known:
            continue
        command = [sys.executable, "-m", "benchmarks.inference", "--child", network, form, str(steps), str(batch)]
        command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode == LEFT_OUT:
            left_out[done.stdout.strip()] = None
            continue
        done.check_returncode()
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
        if kept:
            with kept.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    text = report(rows, list(left_out), " ".join(["python -m benchmarks.inference", *sys.argv[1:]]))
    options.out.write_text(text) if options.out else print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
