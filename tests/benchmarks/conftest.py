"""Fixtures of the study."""

import pytest
from toy_study import TAUGHT, leave, place_in

from benchmarks.study import records


@pytest.fixture
def place(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
    (tmp_path / "teacher.safetensors").touch()
    return place_in(tmp_path)


@pytest.fixture
def study(tmp_path):
    """Three seeds of kd and joint, one of others; joint's third on another machine."""
    runs, results = tmp_path / "runs", tmp_path / "results"
    for seed, (kd, joint) in enumerate([(60.0, 62.0), (60.4, 62.2), (60.8, 62.7)]):
        leave(runs, "kd", seed, kd, teacher_top1=87.5, student_agreement=90.0 + seed / 2)
        leave(runs, "joint", seed, joint, cpu="another" if seed == 2 else "a processor", **TAUGHT)
    leave(runs, "teacher_weights", top1=60.5)
    leave(runs, "scratch", top1=40.0, lr=0.03)
    leave(runs, "bptt", top1=41.25, lr=0.03)
    records.collect(runs, "short", results)
    return records.file_of(results, "short", "no")
