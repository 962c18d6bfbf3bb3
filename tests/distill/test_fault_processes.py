"""Two processes leave out the same images, end together where they cannot, and are told of what either found.

What they keep of a training goes on in one, and the reverse; random numbers are each process's own.
"""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file
from test_processes import HERE, environment
from toy_runs import rewrite_manifest
from toy_states import Noise, continued, trained

from distill.checkpoints import Checkpoints

ALONE = {}
"""Weights of a run of one process, as it was and an epoch later."""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    ALONE["as it was"] = trained(folder / "alone", 2)
    shutil.copytree(folder / "alone", folder / "longer")
    ALONE["longer"] = continued(folder / "longer", 3)
    shutil.copytree(folder / "alone", folder / "skipping")
    newest = Checkpoints(folder / "skipping" / "checkpoints" / "student").newest().path
    text = json.dumps(json.loads((newest / "progress_0.json").read_text()) | {"skipped_in_a_row": 2})
    (newest / "progress_0.json").write_text(text)
    files = json.loads((newest / "manifest.json").read_text())["files"]
    rewrite_manifest(newest, files=files | {"progress_0.json": hashlib.sha256(text.encode()).hexdigest()})
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
        assert json.loads((done / f"energies.{rank}.json").read_text())["rows"] == [0, 0, 1]
    for reason in ("out of luck", "no costs of the teacher"):
        text = f"energies could not be counted (RuntimeError: on another process: ValueError: {reason})"
        assert text in said(done, "energies", 0)


def test_an_image_that_one_process_alone_cannot_read_ends_all_with_one_error(done):
    assert json.loads((done / "apart.json").read_text())["statuses"] == [2, 2]
    errors = [said(done, "apart", rank).count("error: process 0 found 12 images to train on") for rank in (0, 1)]
    assert sum(errors) == 1
    line = said(done, "apart", errors.index(1)).splitlines()[-1]
    assert "process 1 11 images to train on and 10 to evaluate on: all must read the same files" in line
    assert line.endswith("train/2/3.png")


@pytest.fixture
def noted_states(done):
    """By each process."""
    assert json.loads((done / "states.json").read_text())["statuses"] == [0, 0], said(done, "states", 1)
    return [json.loads((done / f"states.{rank}.json").read_text()) for rank in (0, 1)]


def test_a_run_of_one_process_goes_on_in_two(noted_states):
    for found, further in (process["of_one"] for process in noted_states):
        assert found == ALONE["as it was"]
        np.testing.assert_allclose(further, ALONE["longer"], rtol=1e-9, atol=1e-9)


def test_a_run_of_two_processes_goes_on_in_one(done, noted_states):
    run = done / "states" / "two"
    saved = load_file(Checkpoints(run / "checkpoints" / "student").newest().path / "model.safetensors")
    assert set(saved) == {"1.weight", "1.bias"}  # as one process names them
    assert continued(run, 2) == noted_states[0]["two"] == noted_states[1]["two"]
    np.testing.assert_allclose(continued(run, 3), ALONE["longer"], rtol=1e-9, atol=1e-9)


def test_a_process_that_joins_knows_how_many_steps_were_skipped_in_a_row(noted_states):
    assert [process["skipped"] for process in noted_states] == [[2], [2]]  # or one would end the run alone


def test_machines_that_do_not_share_a_folder_end_at_the_first_checkpoint(done, noted_states):
    for text in (process["own_disks"] for process in noted_states):
        assert "progress_1.json, random_states_1.pkl is missing in" in text and "must see the same run.dir" in text
        assert text.endswith("no checkpoint was written before")
    assert list((done / "states" / "disk0" / "checkpoints" / "student").iterdir()) == []


def test_each_process_draws_its_own_numbers_and_a_resumed_one_those_it_would_have(tmp_path, noted_states):
    alone = Noise()
    trained(tmp_path / "alone", 2, noise=alone)
    main, other = (process["draws"] for process in noted_states)
    for whole, cut, again in (main, other):
        assert len(whole) == 4 and len(set(whole)) == 4
        assert cut == whole[:3] and again == whole[2:]  # the pass of the loss that was cut is made again
    assert main[0] == alone.drawn and not set(main[0]) & set(other[0])


def test_a_loop_that_grows_on_one_process_alone_is_weakened_on_all(done, noted_states):
    for found in (process["growth"] for process in noted_states):
        first, second = found["gains"]
        assert second == pytest.approx(first * 0.9 / 2, rel=1e-6)
    saved = Checkpoints(done / "states" / "growth" / "checkpoints" / "student").newest().path
    assert load_file(saved / "model.safetensors")["loop.excess"].item() == 3  # found in the last step


def test_a_batch_with_a_loop_is_tried_on_each_process_by_itself(noted_states):
    assert [process["growth"]["batch"] for process in noted_states] == [[4, 2]] * 2
