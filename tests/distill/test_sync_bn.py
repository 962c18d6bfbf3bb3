"""Several processes with a share of the batch each train as one process with the whole batch, to 1e-10."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sync_program import ALONE, CASES, COMPILABLE, COMPILED, train_once

HERE = Path(__file__).parent
APART = [
    "rate_m, Residual",
    "rate_s, Norms",
    "bptt, Norms",
    "sltt, Residual",
    "ide",
    "teacher, its own norms",
    "joint, rate_m",
]
"""The cases that are run without synchronisation, too."""
FEW = ["rate_m, Norms", "rate_m, unequal", "rate_s, unequal", "bptt, unequal", "teacher, unequal", "joint, rate_m"]
"""The cases of four processes, which differ from two in nothing but the reductions."""


def run_processes(count, names, folder, device="cpu"):
    """The results of each process, by case."""
    paths = [str(HERE.parents[1]), str(HERE.parent / "models"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    program = [sys.executable, str(HERE / "sync_program.py"), str(folder), str(count), device, *names]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_processes(2, [*CASES, *COMPILABLE, *(name + ALONE for name in APART)], tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def two_compiled(tmp_path_factory):
    return run_processes(2, list(COMPILED), tmp_path_factory.mktemp("two_compiled"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_processes(4, FEW, tmp_path_factory.mktemp("four"))


@functools.cache
def of_one_process(name, processes):
    return train_once(CASES[name], of=processes)


def distance(ours, theirs):
    """The largest of all differences, each as a share of the largest number of its tensor.

    A bias in front of a norm has a gradient of 0 and rounding: no tensor counts as smaller than 1/1000 of the largest.
    """
    assert ours.keys() == theirs.keys()
    worst = 0.0
    least = max(t.abs().max().item() for t in theirs.values() if t is not None) / 1000
    for name, expected in theirs.items():
        assert (ours[name] is None) == (expected is None), name
        if expected is not None:
            scale = max(least, expected.abs().max().item())
            worst = max(worst, (ours[name] - expected).abs().max().item() / scale)
    return worst


def assert_as_one_process(results, name, reference):
    expected = of_one_process(reference, len(results))
    alive = [g for g in expected["gradients"].values() if g is not None and g.norm() > 1e-6]
    assert len(alive) > 3, "gradients of 0 tell nothing"
    losses = [result[name]["loss"] for result in results]
    torch.testing.assert_close(torch.stack(losses).mean(), expected["loss"], rtol=1e-12, atol=0)
    for result in results:
        assert distance(result[name]["gradients"], expected["gradients"]) < CASES[reference].tolerance
        assert distance(result[name]["buffers"], expected["buffers"]) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(two, name):
    assert_as_one_process(two, name, name)


@pytest.mark.parametrize("name", APART)
def test_without_synchronisation_they_do_not(two, name):
    expected = of_one_process(name, 2)
    for result in two:
        assert distance(result[name + ALONE]["gradients"], expected["gradients"]) > 1e-2
        assert distance(result[name + ALONE]["buffers"], expected["buffers"]) > 1e-3


@pytest.mark.parametrize("name", COMPILABLE)
def test_what_a_compiler_is_given_trains_as_what_is_written(two, name):
    assert_as_one_process(two, name, name.removesuffix(", compilable"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_they_train_as_one_that_is_not(two_compiled, name):
    assert_as_one_process(two_compiled, name, name.removesuffix(", compiled"))


@pytest.mark.parametrize("name", FEW)
def test_four_processes_train_as_one(four, name):
    assert_as_one_process(four, name, name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_two_processes_on_a_gpu_train_as_one_on_a_cpu(tmp_path):
    results = run_processes(2, [*CASES], tmp_path, "cuda")  # gloo, as two processes of NCCL take two GPUs
    for name in CASES:
        assert_as_one_process(results, name, name)
