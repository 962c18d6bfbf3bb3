"""A program: one run uninterrupted, the same run killed (SIGKILL) again and again and resumed; both must end alike.

    python killed_runs.py FOLDER SCHEDULE PROCESSES KILLS SEED

It forks, so that torch is imported once. Every place where a run could leave something half done is a tick: behind each
batch, before and behind each file and folder that is written, moved or deleted. A kill falls on a tick drawn by chance.
Prints one JSON object: the ticks of the whole run, those of the kills, and the differences found.
"""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import sys
from pathlib import Path

import torch
from toy_runs import distil, equal, timeless, tiny, weights_of

from distill import checkpoints, hybrid_network, hybrid_training, loop, results, runs


class Ticks:
    """Counts, and kills this process at a number."""

    def __init__(self, deadly: int | None) -> None:
        self.count, self.deadly = 0, deadly

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner, name: str) -> None:
        """Ticks before and behind each call of a function."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            self()
            result = function(*args, **kwargs)
            self()
            return result

        setattr(owner, name, wrapped)


def watch(ticks: Ticks) -> None:
    ticks.around(loop._Fit, "_pass")
    ticks.around(loop.Accelerator, "save_state")
    ticks.around(checkpoints, "_sha256")
    ticks.around(checkpoints, "_make")
    ticks.around(checkpoints.Checkpoints, "_publish")
    ticks.around(Path, "rename")
    ticks.around(shutil, "rmtree")
    ticks.around(runs.RunFolder, "append_metrics")
    ticks.around(runs, "replace_text")
    ticks.around(hybrid_training, "save_hybrid")
    ticks.around(hybrid_network, "save_tensors")
    ticks.around(results, "save_snn")


def config_of(folder: Path, schedule: str, processes: int):
    augmented = dict(max_train_samples=64, max_eval_samples=30, crop_padding=1, hflip=0.5)
    train = dict(epochs=2, batch_size=16 // processes, lr=0.05, ema=0.9, mixup=0.2)
    options = dict(epochs=[1, 1, 1, 2]) if schedule == "progressive" else {}
    return tiny(
        folder,
        run=dict(dir=str(folder), trackers=[], compile=False, threads=1, save_every="3 steps"),
        data=augmented,
        train=train,
        teacher_train=train | dict(ema=None),
        student=dict(timesteps=2, encoder="poisson"),  # draws random numbers, in evaluation too
        schedule=dict(name=schedule, **options),
    )


def attempt(folder: Path, schedule: str, processes: int, deadly: int | None, rank: int, resume: bool) -> int:
    """One run in forked processes; the one of that rank dies at that tick. Returns the ticks, 0 for a killed run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reader, writer = os.pipe()
    children = []
    for number in range(processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if processes > 1:
                    places = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
                    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                    os.environ.update({name: str(value) for name, value in (places | address).items()})
                torch.set_num_threads(1)
                ticks = Ticks(deadly if number == rank else None)
                watch(ticks)
                distil(config_of(folder, schedule, processes), resume)
                if number == 0:
                    os.write(writer, str(ticks.count).encode())
                status = 0
            except BaseException:
                if deadly is None:
                    import traceback

                    traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    os.close(writer)
    statuses = []
    for _ in range(processes):
        child, status = os.wait()
        statuses.append(status)
        if os.WIFSIGNALED(status):  # as a launcher does
            for other in children:
                with contextlib.suppress(ProcessLookupError):  # those that have ended already
                    os.kill(other, signal.SIGKILL)
    count = int(os.read(reader, 32) or 0)
    os.close(reader)
    if deadly is None and any(statuses):
        raise RuntimeError(f"the run failed with {statuses}")
    return 0 if any(statuses) else count


def main(folder: Path, schedule: str, processes: int, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    whole, cut = folder / "whole", folder / "cut"
    total = attempt(whole, schedule, processes, None, 0, False)
    deaths: list[int] = []
    for number in range(kills):
        deaths.append(draw.randint(1, total))
        attempt(cut, schedule, processes, deaths[-1], draw.randrange(processes), number > 0)
    attempt(cut, schedule, processes, None, 0, True)
    different = []
    if timeless(whole) != timeless(cut):
        different.append("metrics")
    networks = ["student", *(f"hybrids/layer{n}" for n in (1, 2, 3))]
    different += [name for name in networks if not equal(weights_of(whole, name), weights_of(cut, name))]
    clock = {"seconds", "train_seconds", "images_per_second"}
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, cut)]
    different += [k for k in summaries[0] if k not in clock and summaries[0][k] != summaries[1][k]]
    print(json.dumps({"ticks": total, "kills": deaths, "different": different}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]))
