"""What two processes keep of a training goes on in one, and the reverse; random numbers are each process's own."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file
from state_program import Noise, continued, trained
from test_processes import HERE, environment

from distill.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The jobs' folder; in alone.0.json the weights of a run of one process, as it was and an epoch later."""
    folder = tmp_path_factory.mktemp("states")
    as_it_was = trained(folder / "alone", 2)
    shutil.copytree(folder / "alone", folder / "longer")
    (folder / "alone.0.json").write_text(json.dumps([as_it_was, continued(folder / "longer", 3)]))
    program = [sys.executable, str(HERE / "state_program.py"), str(folder)]
    ended = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return folder


def noted(folder, job, rank=0):
    statuses = json.loads((folder / f"{job}.json").read_text())["statuses"]
    assert set(statuses) == {0}, [(folder / f"{job}.{rank}.txt").read_text() for rank in range(len(statuses))]
    return json.loads((folder / f"{job}.{rank}.json").read_text())


def test_a_run_of_one_process_goes_on_in_two(done):
    as_it_was, longer = json.loads((done / "alone.0.json").read_text())
    for rank in (0, 1):
        found, further = noted(done, "of_one", rank)
        assert found == as_it_was
        np.testing.assert_allclose(further, longer, rtol=1e-9, atol=1e-9)


def test_a_run_of_two_processes_goes_on_in_one(done):
    _, longer = json.loads((done / "alone.0.json").read_text())
    saved = load_file(Checkpoints(done / "two" / "checkpoints" / "student").newest().path / "model.safetensors")
    assert set(saved) == {"1.weight", "1.bias"}  # as one process names them
    assert continued(done / "two", 2) == noted(done, "two", 0) == noted(done, "two", 1)
    np.testing.assert_allclose(continued(done / "two", 3), longer, rtol=1e-9, atol=1e-9)


def test_machines_that_do_not_share_a_folder_end_at_the_first_checkpoint(done):
    for rank in (0, 1):
        said = noted(done, "own_disks", rank)
        assert "progress_1.json, random_states_1.pkl is missing in" in said and "must see the same run.dir" in said
        assert said.endswith("no checkpoint was written before")
    assert list((done / "own_disks" / "0" / "checkpoints" / "student").iterdir()) == []


def test_each_process_draws_its_own_numbers_and_a_resumed_one_those_it_would_have(done):
    alone = Noise()
    trained(done / "alone_draws", 2, noise=alone)
    main, other = (noted(done, "draws", rank) for rank in (0, 1))
    for whole, cut, again in (main, other):
        assert len(whole) == 4 and len(set(whole)) == 4
        assert cut == whole[:3] and again == whole[2:]  # the pass of the loss that was cut is made again
    assert main[0] == alone.drawn and not set(main[0]) & set(other[0])
