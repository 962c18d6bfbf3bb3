"""Two processes leave out the same images, end together where they cannot, and are told of what either found."""

import json
import subprocess
import sys

import pytest
from test_processes import HERE, environment


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    program = [sys.executable, str(HERE / "fault_program.py"), str(folder)]
    ended = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return folder


def said(folder, job, rank):
    return (folder / f"{job}.{rank}.txt").read_text()


def noted(folder, rank):
    return json.loads((folder / f"together.{rank}.json").read_text())


def test_each_process_looks_at_its_share_of_the_held_out_images_and_all_leave_out_the_same(done):
    statuses = json.loads((done / "together.json").read_text())["statuses"]
    assert statuses == [0, 0], [said(done, "together", rank) for rank in (0, 1)]
    broken = [str(done / "photos" / name) for name in ("val/10/1.png", "val/2/0.png")]
    for rank in (0, 1):
        found = noted(done, rank)
        assert (found["decoded"], found["held_out"], found["skipped"]) == (6, 10, broken)


def test_warnings_are_given_by_the_main_process_alone_and_once(done):
    main = said(done, "together", 0)
    for text in ("val/10/1.png", "val/2/0.png", "fused passes run uncompiled"):
        assert main.count(text) == 1, (text, main)
    assert main.count("timm would number them differently") == 2  # of either split
    assert said(done, "together", 1) == ""


def test_the_images_of_a_bad_step_are_kept_of_all_processes(done):
    path = done / "together" / "bad_steps" / "student_1.json"
    processes = json.loads(path.read_text())["processes"]
    assert processes[1]["loss"] == "total nan" and "nan" not in processes[0]["loss"]
    images = [index for process in processes for index in process["images"]]
    assert [len(process["images"]) for process in processes] == [3, 3] and len(set(images)) == 6
    for process in processes:  # in the order of their paths: 10/0 to 10/5, then 2/0 to 2/5
        expected = [f"train/{'10' if i < 6 else '2'}/{i % 6}.png" for i in process["images"]]
        assert process["names"] == [str(done / "photos" / name) for name in expected]
    for rank in (0, 1):
        assert f"images {images} ({path} has all 6" in noted(done, rank)["error"]


def test_energies_that_one_process_alone_cannot_count_are_left_out_on_all(done):
    assert json.loads((done / "energies.json").read_text())["statuses"] == [0, 0], said(done, "energies", 1)
    for rank in (0, 1):
        assert json.loads((done / f"energies.{rank}.json").read_text())["rows"] == [0, 1]
    assert "energies could not be counted (RuntimeError: on another process: ValueError: out" in said(
        done, "energies", 0
    )


def test_an_image_that_one_process_alone_cannot_read_ends_all_with_one_error(done):
    assert json.loads((done / "apart.json").read_text())["statuses"] == [2, 2]
    errors = [said(done, "apart", rank).count("error: process 0 found 12 images to train on") for rank in (0, 1)]
    assert sum(errors) == 1
    line = said(done, "apart", errors.index(1)).splitlines()[-1]
    assert "process 1 11 images to train on and 10 to evaluate on: all must read the same files" in line
    assert line.endswith("train/2/3.png")
