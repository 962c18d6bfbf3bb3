"""A program: tiny runs in one process and, with the same images in each step, in two (gloo); for test_processes.py.

    python process_program.py FOLDER          all of that
    python process_program.py FOLDER fail     one run of which the process of rank 1 fails, for a launcher

The first forks, so that torch is imported once. Each run is in FOLDER/JOB/RUN; FOLDER/JOB.RANK.txt is what a process of
a job printed, FOLDER/JOB.RANK.json what it noted, FOLDER/JOB.json the job's exit statuses and seconds.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401 - what every fork would import anew
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy_runs import TEACHER, distil, start, tiny

import models
from distill import DataConfig, cli, loop
from distill.data import Preprocessing, eval_loader, load_data, prepare_loader, sample_loader
from distill.data.transforms import Normalize
from distill.early_exit import early_exit
from distill.energy import spiking_costs
from distill.evaluation import top1
from distill.judgement import judge
from distill.preparation import share_norms
from models import NeuronConfig

BATCH = 16
"""Images of a step; 64 in an epoch, so four steps."""
EPOCHS = 2
SCHEDULES = {
    "accumulated": dict(name="joint"),
    "progressive": dict(name="progressive", epochs=[1, 1, 1, 1]),
    "stochastic": dict(name="stochastic"),
}
SMALLER = TEACHER | dict(kwargs={"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]})
STUDENT = dict(timesteps=2, neuron=NeuronConfig(leak=1.0, threshold=0.5))
"""Every layer of it fires, untrained as it is."""
SIZES = (30, 29, 17, 5)
"""Of sets to evaluate on, in batches of 8."""
STOPPED_IN = 5
"""Which step of the student's the process of rank 1 is asked to stop in, from 0 up: the second of the second epoch."""
FAILS_IN = 2


def forked(folder: Path, job: str, processes: int, work: Callable[[Path], None]) -> list[int]:
    """Runs `work` in as many processes as a launcher would; returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / job).mkdir()
    children = []
    started = time.perf_counter()
    for rank in range(processes):
        if (child := os.fork()) == 0:
            places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
            address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            if processes > 1:
                os.environ.update({name: str(value) for name, value in (places | address).items()})
            output = os.open(folder / f"{job}.{rank}.txt", os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os._exit(_status(work, folder / job))
        children.append(child)
    statuses = {}
    for _ in children:
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    ended = [statuses[child] for child in children]
    (folder / f"{job}.json").write_text(json.dumps({"statuses": ended, "seconds": seconds}))
    return ended


def _status(work: Callable[[Path], None], folder: Path) -> int:
    """What Python makes of the end of a program."""
    try:
        work(folder)
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def note(folder: Path, values: Any) -> None:
    folder.with_name(f"{folder.name}.{rank()}.json").write_text(json.dumps(values))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def config_of(folder: Path, run: str = "joint"):
    """A step has the same images however many processes and batches they are divided among.

    Only the joint run trains its own teacher, has two epochs and saves hybrids.
    """
    accumulate = 4 if run == "accumulated" else 1
    parts = int(os.environ.get("WORLD_SIZE", "1")) * accumulate
    train = dict(epochs=EPOCHS, batch_size=BATCH // parts, accumulate=accumulate, lr=0.05, warmup_steps=3)
    if run == "joint":
        return tiny(folder, train=train, teacher_train=train | dict(epochs=1), teacher=SMALLER, student=STUDENT)
    teacher = SMALLER | dict(weights=str(folder.parent / "joint" / "teacher"))
    few = dict(train=train | dict(epochs=1), teacher=teacher, student=STUDENT, eval_timesteps=[], save_hybrids=False)
    return tiny(folder, **few, schedule=SCHEDULES[run], data=dict(max_train_samples=64, max_eval_samples=12))


# -- jobs ---------------------------------------------------------------------------------------------


def train(folder: Path) -> None:
    """Runs in every schedule, and one with gradient accumulation.

    Notes the learning rate of each step, what was written, and what an evaluation of the same network says.
    """
    rates: dict[str, list[float]] = {}
    written: set[str] = set()
    run = ""

    def opened(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], (str, Path)) and isinstance(args[2], int):
            if args[2] & (os.O_WRONLY | os.O_RDWR) and str(args[0]).startswith(str(folder)):
                written.add(str(args[0]).removeprefix(str(folder)))
        elif event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree"):
            written.add(str(args[0]).removeprefix(str(folder)))

    register_optimizer_step_pre_hook(lambda optimizer, *_: rates[run].append(optimizer.param_groups[0]["lr"]))
    sys.addaudithook(opened)
    for run in ("joint", *SCHEDULES):
        rates[run] = []
        distil(config_of(folder / run, run))
    found = sorted(written)
    note(folder, {"rates": rates, "written": found, "figures": evaluate(folder), "norms": shared_norms()})


def shared_norms() -> list[float]:
    """The running means of two batch norms that each process has moved otherwise, once they are shared."""
    network = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1), nn.BatchNorm2d(1))
    for number, norm in enumerate((network[0], network[2])):
        nn.init.constant_(norm.running_mean, 10 * rank() + number)
    share_norms(network)
    return [norm.running_mean.item() for norm in (network[0], network[2])]


def evaluate(folder: Path) -> dict[int, dict[str, float]]:
    """Accuracy and firing rates of a trained student on sets of several sizes."""
    session = start(config_of(folder / "unused"))
    student = models.load_snn(folder.parent / "alone" / "joint" / "student").eval()  # the same everywhere
    preprocessing = Preprocessing(input_size=(1, 8, 8), mean=(0.3,), std=(0.4,))
    figures = {}
    for size in SIZES:
        data = load_data(DataConfig(max_eval_samples=size), preprocessing, 0)
        assert len(data.eval) == size
        loader = prepare_loader(session.accelerator, eval_loader(data.eval, 8))
        accuracy = top1(session.accelerator, loader, lambda images: {"student": student(images)})
        judged = judge(session.accelerator, loader, lambda images: {"student": student(images)}, student)
        figures[size] = {**accuracy, **judged.firing_rates}
        figures[size] |= {"top5": judged.figures["student"].top5, "ece": judged.figures["student"].ece}
        sample = prepare_loader(session.accelerator, sample_loader(data.eval, 13, 4))
        costs = spiking_costs(session.accelerator, sample, student)
        figures[size] |= {"acs": costs.whole.acs, "counted on": costs.images}
        (exits,) = early_exit(session.accelerator, loader, student, [0.5])
        figures[size] |= exits
    return figures


def stop(folder: Path) -> None:
    """A run of which one process is asked to stop; the others are not."""
    step_of = loop._Fit._pass

    def asked(fit: loop._Fit, *args: Any) -> None:
        done = fit.progress.epochs * fit.steps_per_epoch + fit.progress.batches - 1
        if fit.stage == "student" and done == STOPPED_IN and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step_of(fit, *args)

    loop._Fit._pass = asked
    cli.run(lambda: distil(config_of(folder / "joint")))


def go_on(folder: Path) -> None:
    distil(config_of(folder.with_name("stopped") / "joint"), resume=True)


def fail(folder: Path) -> None:
    """A run of which one process fails in the middle of an epoch."""
    step_of = loop._Fit._pass

    def fails(fit: loop._Fit, *args: Any) -> None:
        if fit.progress.batches - 1 == FAILS_IN and rank() == 1:
            note(folder, time.time())
            raise ValueError("image 17 of digits cannot be read")
        step_of(fit, *args)

    loop._Fit._pass = fails
    cli.run(lambda: distil(config_of(folder / "joint")))


def in_float64() -> None:
    """In float32 another order of sums makes a membrane in a million fire, or not, and then everything differs."""
    torch.set_default_dtype(torch.float64)
    in_float32 = Normalize.__call__
    Normalize.__call__ = lambda self, image: in_float32(self, image).double()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    in_float64()
    forked(folder, "alone", 1, train)
    forked(folder, "two", 2, train)
    forked(folder, "stopped", 2, stop)
    forked(folder, "resumed", 2, go_on)
    forked(folder, "failed", 2, fail)


if __name__ == "__main__":
    if sys.argv[2:] == ["fail"]:
        fail(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]))
