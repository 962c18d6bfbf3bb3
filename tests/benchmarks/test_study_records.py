"""What is kept of a run."""

import json

import pytest
from toy_study import TAUGHT, leave

from benchmarks import machine
from benchmarks.study import records, running


def test_a_record_holds_what_the_run_folder_says(tmp_path):
    found = records.record_of(leave(tmp_path, "joint", seed=2, top1=61.23456789, **TAUGHT))
    assert found["row"] == "joint" and found["seed"] == 2 and found["commit"] == "abc1234, def5678"
    assert found["top1"] == 61.2346 and found["teacher_top1"] == 87.5 and found["timesteps"] == 4
    assert found["hybrid_top1"] == {"layer1": 81.0, "layer2": 72.0} and found["processes"] == 2
    energies = [found[f"{who}{kind}_uj"] for who in ("", "teacher_") for kind in ("compute", "memory")]
    assert energies == [10.0, 400.0, 80.0, 200.0]
    assert found["gpu"] is None  # runs of before it was kept
    assert found["train_seconds"] == 150.0 and found["images_per_second"] == 16.0  # 2400 images in 150 s
    assert found["wall_seconds"] == 300.0 and found["peak_mb"] == 900.0
    assert found["curve"] == [[1, 51.2346, 60.0], [2, 61.2346, 150.0]]


def test_wall_time_is_unknown_where_the_first_process_left_no_record(tmp_path):
    folder = leave(tmp_path, "kd")
    record = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(record | {"processes": record["processes"][1:]}))
    assert records.record_of(folder)["wall_seconds"] is None


def test_the_first_runs_records_are_read(tmp_path):
    found = records.record_of(leave(tmp_path, "kd", old=True))
    assert found["wall_seconds"] == 240.0 and found["peak_mb"] == 1024.0 and found["commit"] == "old1234"


def test_epochs_of_a_hybrids_stage_take_time_and_have_no_point(tmp_path):
    folder = leave(tmp_path, "progressive")
    first = {"stage": "stage1_layer2", "train_seconds": 40.0, "images": 1200, "hybrid_top1/layer2": 77.0}
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(json.dumps(first) + "\n" + text)
    assert records.record_of(folder)["curve"] == [[2, 40.0, 100.0], [3, 50.0, 190.0]]


def test_an_analogue_networks_accuracy_is_its_own(tmp_path):
    folder = leave(tmp_path, "ann")
    (folder / "summary.json").write_text(json.dumps({"teacher_top1": 66.0, "versions": {}}))
    line = {"stage": "teacher", "train_seconds": 10.0, "images": 500, "teacher_top1": 66.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = records.record_of(folder)
    assert (found["top1"], found["teacher_top1"], found["timesteps"]) == (66.0, None, None)
    assert found["curve"] == [[1, 66.0, 10.0]] and found["images_per_second"] == 50.0


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.commit(running.REPOSITORY) == "no commit"


@pytest.mark.parametrize(
    ("script", "name"), [("echo NVIDIA H200; echo NVIDIA H100", "NVIDIA H200"), ("exit 9", None), ("true", None)]
)
def test_the_graphics_processor_is_the_drivers_first(script, name, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpu() == name
    program.unlink()
    assert machine.gpu() is None


def test_collected_runs_add_up_and_the_newest_counts(tmp_path, capsys):
    first, second, results = tmp_path / "first", tmp_path / "second", tmp_path / "results"
    leave(first, "kd", seed=0, top1=60.0)
    leave(first, "scratch", top1=40.0)
    (first / "short" / "kd" / "seed0-2").mkdir()
    (first / "short" / "joint" / "seed0").mkdir(parents=True)  # not finished
    leave(first, "gone")
    records.collect(first, "short", results)
    assert "gone/seed0 is left out: no row has this name" in capsys.readouterr().err
    file = records.file_of(results, "short", "no")
    assert [(r["row"], r["top1"]) for r in records.read(file)] == [("scratch", 40.0), ("kd", 60.0)]
    newer = leave(second, "kd", seed=0, top1=61.0)
    leave(second, "kd", seed=1, top1=62.0)
    leave(second, "scratch", top1=41.0, cpu="another processor")
    records.collect(second, "short", results)
    found = [(r["row"], r["seed"], r["cpu"], r["top1"]) for r in records.read(file)]
    assert found == [
        ("scratch", 0, "a processor", 40.0),
        ("scratch", 0, "another processor", 41.0),
        ("kd", 0, "a processor", 61.0),
        ("kd", 1, "a processor", 62.0),
    ]
    assert str(tmp_path) not in file.read_text()
    on_gpu = records.record_of(newer) | {"gpu": "a GPU"}
    assert records.newest([*records.read(file), on_gpu]) == [*records.read(file)[:3], on_gpu, records.read(file)[3]]
    old = json.loads(json.dumps(records.record_of(newer)))
    old["ended"], old["top1"] = "2020-01-01T00:00:00+00:00", 1.0
    assert records.newest([*records.read(file), old]) == records.read(file)
