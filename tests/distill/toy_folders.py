"""Folders of runs, with nothing trained in them."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from distill import RunConfig
from distill.opening import open_run
from distill.runs import CONFIG

RESOLVED = {"train": {"lr": 0.1, "epochs": 3}, "run": {"seed": 0, "trackers": []}, "taps": None}


def changed(**values):
    """RESOLVED with other values of dotted names, their dots written as __."""
    found = json.loads(json.dumps(RESOLVED))
    for name, value in values.items():
        *sections, key = name.split("__")
        target = found
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return found


def opened(folder="mine", saved=True, done=False, config=RESOLVED, age=None):
    """A run of its own, which has saved something, so many seconds ago, and perhaps come to its end."""
    path = open_run(RunConfig(dir=folder), False, config).path
    left = []
    if saved:
        left.append(path / "checkpoints" / "student" / "epoch_0001")
        left[0].mkdir(parents=True)
    if done:
        left.append(path / "summary.json")
        left[-1].write_text("{}")
    if age is not None:
        for found in left or [path / CONFIG]:
            os.utime(found, (1e9 - age, 1e9 - age))
    return path


def resume(folder="mine", config=RESOLVED):
    return open_run(RunConfig(dir=folder), True, config).path


HOLD = """
import sys, yaml
from distill import RunConfig
from distill.opening import open_run
run = open_run(RunConfig(dir="mine"), sys.argv[1] == "resume", yaml.safe_load(sys.argv[2]))
print(run.path.name, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(how):
    """The name of a run's folder in which another process is."""
    root = str(Path(__file__).resolve().parents[2])
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, how, json.dumps(RESOLVED)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    try:
        yield other.stdout.readline().strip()
    finally:
        other.communicate("")
