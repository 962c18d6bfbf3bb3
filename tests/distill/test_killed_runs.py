"""Runs that are killed at any moment end, resumed, like runs that were never interrupted, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("schedule", "processes", "kills", "seed"),
    [
        ("joint", 1, 2, 0),
        pytest.param("joint", 1, 8, 1, marks=pytest.mark.slow),
        pytest.param("progressive", 1, 12, 2, marks=pytest.mark.slow),
        pytest.param("stochastic", 1, 8, 3, marks=pytest.mark.slow),
        pytest.param("joint", 2, 6, 4, marks=pytest.mark.slow),
        pytest.param("progressive", 2, 6, 5, marks=pytest.mark.slow),
        pytest.param("stochastic", 2, 6, 6, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_like_a_whole_one(tmp_path, schedule, processes, kills, seed):
    places = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    run = subprocess.run(
        [sys.executable, HERE / "killed_runs.py", tmp_path, schedule, *map(str, (processes, kills, seed))],
        env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found["kills"]) == kills and found["different"] == [], found
