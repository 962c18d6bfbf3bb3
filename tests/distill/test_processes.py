"""Several processes are one run: its learning rate, its figures, its folder, its output, its end."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from toy_runs import equal, metrics_of, timeless, weights_of

from distill.interruption import EXIT_PREEMPTED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAUNCH_FILES = ROOT / "configs" / "accelerate"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TINY = [
    *("--teacher.kwargs", "{channels: [8, 8, 8, 8], layers: [1, 1, 1, 1]}", "--teacher.input_size", "[1, 8, 8]"),
    *("--teacher.min_top1", "0", "--data.max_train_samples", "64", "--data.max_eval_samples", "30"),
    *("--teacher_train.epochs", "1", "--teacher_train.batch_size", "8", "--train.batch_size", "8"),
    *("--student.timesteps", "2", "--eval_timesteps", "[]"),
    *("--run.threads", "1", "--run.trackers", "[]", "--run.compile", "false"),
]
RUNS = ["joint", "progressive", "stochastic", "accumulated"]


def environment(**more):
    """On CPUs, which nobody has to say: GPUs are hidden."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "SPIKESWAP_", "SLURM_"))}
    paths = {"PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])}
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "80"}
    return kept | paths | fixed | more


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def read(path):
    return json.loads(path.read_text())


def curve(steps):
    """The learning rate of each step: 1/4, 2/4, 3/4 of 0.05 for a warm-up of three steps, then half a cosine to 0."""
    falling = [0.025 * (1 + math.cos(math.pi * n / (steps - 3))) for n in range(steps - 3)]
    return [0.0125, 0.025, 0.0375, *falling]


# -- launch files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("one_gpu", DistributedType.NO, 1, 1),
        ("gpus_8", DistributedType.MULTI_GPU, 1, 8),
        ("several_machines", DistributedType.MULTI_GPU, 2, 16),
        ("cpu", DistributedType.MULTI_GPU, 1, 2),
    ],
)
def test_accelerate_reads_each_launch_file(name, kind, machines, processes):
    found = load_config_from_file(str(LAUNCH_FILES / f"{name}.yaml"))
    assert (found.distributed_type, found.num_machines, found.num_processes) == (kind, machines, processes)
    assert found.use_cpu == (name == "cpu") and found.mixed_precision is None  # numbers are the recipe's to set
    arguments = launch_command_parser().parse_args(["--config_file", str(LAUNCH_FILES / f"{name}.yaml"), "script.py"])
    started = _validate_launch_command(arguments)[0]  # of which the file fills what has no default
    assert started.rdzv_backend == found.rdzv_backend == "static"  # machines meet at the one of rank 0


def test_each_launch_file_says_what_it_is_for():
    files = sorted(LAUNCH_FILES.iterdir())
    assert [file.name for file in files] == [
        *("cpu.yaml", "gpus_8.yaml", "one_gpu.yaml", "several_machines.yaml", "slurm.sh"),
    ]
    for file in files:
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#!")]
        assert re.match(r"# [A-Z].+\.$", lines[0]), file
        if file.suffix == ".yaml":
            assert not lines[1].startswith("#") and yaml.safe_load(file.read_text())


# -- one process and two with the same images in each step -----------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    program = [sys.executable, str(HERE / "process_program.py"), str(folder)]
    ended = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=540)
    assert ended.returncode == 0, ended.stderr
    for job in ("alone", "two", "resumed"):
        statuses = read(folder / f"{job}.json")["statuses"]
        assert set(statuses) == {0}, "\n".join((folder / f"{job}.{r}.txt").read_text() for r in range(len(statuses)))
    return folder


@pytest.mark.parametrize("run", RUNS)
def test_the_learning_rate_of_a_step_knows_nothing_of_processes_and_accumulation(done, run):
    student = {
        "joint": curve(8),  # two epochs of four steps
        "stochastic": curve(4),
        "accumulated": curve(4),
        "progressive": 4 * curve(4),  # a curve for each stage
    }[run]
    expected = (curve(4) if run == "joint" else []) + student  # it alone trains its teacher
    for process in ("alone.0", "two.0", "two.1"):
        assert read(done / f"{process}.json")["rates"][run] == pytest.approx(expected, rel=1e-12), process
    for job in ("alone", "two"):
        lines = metrics_of(done / job / run)
        epochs = [line["epoch"] for line in lines]
        assert [line["steps"] for line in lines] == [4 * epoch for epoch in epochs]
        assert [line["lr"] for line in lines] == pytest.approx(expected[::4], rel=1e-12)
        assert [line["images"] for line in lines] == [64] * len(lines)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_with_half_a_batch_distil_as_one_with_the_whole(done, run):
    alone, two = (timeless(done / job / run) for job in ("alone", "two"))
    assert len(alone) == len(two) >= (4 if run == "progressive" else 1)
    for ours, expected in zip(two, alone, strict=True):
        assert ours.pop("stage") == expected.pop("stage") and any(name.startswith("loss/") for name in ours)
        assert ours == pytest.approx(expected, rel=1e-5)  # the sums of the losses are float32
    alone, two = (weights_of(done / job / run) for job in ("alone", "two"))
    assert alone.keys() == two.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-9, atol=1e-9)
    alone, two = (read(done / job / run / "summary.json") for job in ("alone", "two"))
    assert two["firing_rates"] == pytest.approx(alone["firing_rates"], abs=1e-7)
    assert all(0.01 < rate < 0.99 for rate in two["firing_rates"].values()), "silent layers would hide everything"


def test_evaluation_counts_each_image_once(done):
    expected = read(done / "alone.0.json")["figures"]
    assert list(expected) == ["30", "29", "17", "5"]  # of which none is a number of whole batches of two processes
    for rank in range(2):
        found = read(done / f"two.{rank}.json")["figures"]
        for size, figures in expected.items():
            assert found[size] == pytest.approx(figures, abs=1e-5), size
            assert found[size]["counted on"] == min(13, int(size))
            hits = found[size]["student"] * int(size) / 100
            assert hits == pytest.approx(round(hits), abs=1e-4)


def test_running_statistics_that_are_shared_are_the_main_processs(done):
    assert [read(done / f"two.{rank}.json")["norms"] for rank in range(2)] == [[0, 1], [0, 1]]


def test_the_main_process_alone_prints_and_writes(done):
    assert "top-1 (%)" in (done / "two.0.txt").read_text()
    for job in ("two", "stopped", "resumed"):
        assert (done / f"{job}.1.txt").read_text() == ""
    written = [read(done / f"two.{rank}.json")["written"] for rank in range(2)]
    assert any(name.endswith("summary.json.tmp") for name in written[0])
    # but for the state of its own random numbers and counters in each checkpoint
    own = re.compile(r"/\w+/checkpoints/\w+/unfinished_\w+(/(progress_1.json|random_states_1.pkl))?$")
    assert written[1] and [name for name in written[1] if not own.match(name)] == []


def test_asked_to_stop_all_save_within_the_step_and_go_on_bit_for_bit(done):
    assert read(done / "stopped.json")["statuses"] == [EXIT_PREEMPTED] * 2  # only one of them was asked
    said = (done / "stopped.0.txt").read_text()
    assert said.count("asked to stop (SIGTERM) in epoch 2 of the student: a checkpoint is in") == 1
    # asked in the sixth step: two batches into the second epoch. The resumed run has kept it
    assert (done / "stopped/joint/checkpoints/student/epoch_0001_batch_00000002").is_dir()
    whole, cut = done / "two" / "joint", done / "stopped" / "joint"
    assert timeless(whole) == timeless(cut)
    for network in ("student", "hybrids/layer1", "hybrids/layer2", "hybrids/layer3"):
        assert equal(weights_of(whole, network), weights_of(cut, network))


def test_when_one_fails_all_end_and_it_alone_says_why(done):
    statuses = read(done / "failed.json")["statuses"]
    assert statuses == [1, 2]
    assert (done / "failed.json").stat().st_mtime - read(done / "failed.1.json") < 20
    said = [(done / f"failed.{rank}.txt").read_text() for rank in range(2)]
    assert said[1] == "process_program.py: error: image 17 of digits cannot be read\n"
    assert "Traceback" not in said[0] and "rror" not in said[0]  # that the other one is gone
    assert not (done / "failed" / "joint" / "metrics.jsonl").exists()  # it was its first epoch


# -- launchers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory):
    """The folder of two launchers, and what each of them said."""
    folder, port = tmp_path_factory.mktemp("machines"), free_port()
    launchers = []
    for machine in range(2):
        places = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(machine)]
        where = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        file = ["--config_file", str(LAUNCH_FILES / "several_machines.yaml")]
        script = [str(ROOT / "scripts" / "distill.py"), *TINY, "--train.epochs", "1", "--run.dir", "run"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        command = [*ACCELERATE, *file, *places, *where, *script]
        launchers.append(subprocess.Popen(command, cwd=folder, env=environment(), **pipes))
    said = [launcher.communicate(timeout=300) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    assert [out for out, _ in said] == ["", ""]
    return folder, [text for _, text in said]


@pytest.mark.slow
def test_two_machines_leave_one_run(two_machines):
    folder, (main, _) = two_machines
    assert [path.name for path in folder.iterdir()] == ["run"]
    assert main.count("top-1 (%)") == 1 and main.count("everything is in run") == 1
    lines = metrics_of(folder / "run")
    found = [(line["stage"], line["epoch"], line["steps"], line["images"]) for line in lines]
    assert found == [("teacher", 1, 4, 64), ("student", 1, 4, 64)]
    summary = read(folder / "run" / "summary.json")
    for accuracy in (summary["student_top1"], *summary["hybrid_top1"].values()):
        assert accuracy * 30 / 100 == pytest.approx(round(accuracy * 30 / 100))


@pytest.mark.slow
def test_a_machine_without_the_main_process_shows_nothing(two_machines):
    _, (_, other) = two_machines
    assert [line for line in other.splitlines() if "torch/distributed" not in line] == []  # but for its launcher


@pytest.mark.slow
def test_a_launcher_ends_all_processes_when_one_fails(tmp_path):
    command = [*ACCELERATE, "--config_file", str(LAUNCH_FILES / "cpu.yaml"), "--main_process_port", str(free_port())]
    program = [str(HERE / "process_program.py"), str(tmp_path / "failed"), "fail"]
    (tmp_path / "failed").mkdir()
    ended = subprocess.run([*command, *program], env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and ended.stdout == ""
    assert time.time() - read(tmp_path / "failed.1.json") < 30
    assert ended.stderr.count("process_program.py: error: image 17 of digits cannot be read") == 1
    assert "Connection closed" not in ended.stderr  # what gloo says of it on the other process


SLURM_SCRIPT = ["bash", "configs/accelerate/slurm.sh", "scripts/distill.py"]
SLURM = {
    "scontrol": """case "$1 $2" in
    "show job") echo "   JobState=${STATE:-RUNNING} Reason=None Dependency=(null)" ;;
    "show hostnames") echo 127.0.0.1; echo 127.0.0.1 ;;
    requeue*) echo "$2" >>requeued ;;
esac
""",
    # starts the command as two tasks of two machines; a task that fails ends the step
    "srun": """shift
pids=
for task in 0 1; do
    SLURM_PROCID=$task "$@" >"task$task.$SLURM_JOB_ID" 2>&1 &
    pids="$pids $!"
done
echo $pids >launchers
status=0
for pid in $pids; do wait $pid || status=$?; done
exit $status
""",
    "scancel": '[ "$1" = --signal=TERM ] && kill -TERM $(cat launchers)\n',
    "accelerate": 'shift; exec "$PYTHON" -m accelerate.commands.launch "$@"\n',
}
"""Stand-ins for SLURM's commands, on one machine."""


def slurm_job(folder, **commands):
    """The environment of a job of two machines in a folder, where other stand-ins may take the place of some."""
    tools = folder / "bin"
    tools.mkdir()
    for name, text in (SLURM | commands).items():
        (tools / name).write_text("#!/bin/bash\n" + text)
        (tools / name).chmod(0o755)
    (folder / "configs").symlink_to(ROOT / "configs")
    job = dict(SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1", SLURM_JOB_NODELIST="here[0-1]", SLURM_JOB_ID="7")
    return environment(**job, PATH=f"{tools}:{os.environ['PATH']}", PYTHON=sys.executable)


def test_the_launchers_of_a_slurm_job_have_all_cores_of_their_machines(tmp_path):
    job = slurm_job(tmp_path, srun="echo cores=$SRUN_CPUS_PER_TASK\n")
    for cores in ("64", ""):
        found = subprocess.check_output(SLURM_SCRIPT, cwd=tmp_path, env=job | {"SLURM_CPUS_PER_TASK": cores}, text=True)
        assert found == f"cores={cores}\n"


def test_a_slurm_job_resumes_from_its_second_start_on(tmp_path):
    job = slurm_job(tmp_path, srun='echo "${@: -1}"\n')
    for count, last in (({}, "runs/mine"), ({"SLURM_RESTART_COUNT": "1"}, "--resume")):
        found = subprocess.check_output(
            [*SLURM_SCRIPT, "--run.dir", "runs/mine"], cwd=tmp_path, env=job | count, text=True
        )
        assert found == f"{last}\n"


@pytest.mark.parametrize(
    ("step", "state", "queued"),
    [
        ('echo asked to stop >"$SPIKESWAP_STOPPED"; exit 1', "RUNNING", True),  # a pre-emption that leaves time
        ('echo asked to stop >"$SPIKESWAP_STOPPED"; exit 1', "COMPLETING", False),  # cancelled
        ("kill -USR1 $PPID; exit 1", "RUNNING", True),  # out of time, and nothing of the run any more
        ("kill -TERM $PPID; exit 1", "COMPLETING", False),
        ("kill -USR1 $PPID; sleep 0.5; exit 0", "RUNNING", False),  # it was about to end
        ("exit 1", "RUNNING", False),  # it has failed
    ],
)
def test_a_slurm_job_is_queued_again_if_it_was_asked_to_stop_and_not_cancelled(tmp_path, step, state, queued):
    job = slurm_job(tmp_path, srun=f"test ! -s $SPIKESWAP_STOPPED || exit 2\n{step}\n", scancel="")
    (tmp_path / ".stopped-7").write_text("of the job's start before this one")
    ended = subprocess.run(SLURM_SCRIPT, cwd=tmp_path, env=job | {"STATE": state}, timeout=60)
    assert (ended.returncode == 0) == step.endswith("0")
    assert (tmp_path / "requeued").exists() == queued
    assert not (tmp_path / ".stopped-7").exists()


@pytest.mark.slow
def test_a_slurm_job_that_is_pre_empted_is_queued_again_and_goes_on(tmp_path):
    job = slurm_job(tmp_path)
    for name in ("scripts", "distill", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = [*SLURM_SCRIPT, *TINY, "--run.dir", "run", "--train.epochs", "25"]
    start = free_port() % 9000

    def submit(number, **more):
        return subprocess.Popen(script, cwd=tmp_path, env=job | {"SLURM_JOB_ID": str(start + number)} | more)

    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = lambda: len(metrics.read_text().splitlines()) if metrics.exists() else 0  # noqa: E731
    said = lambda number: "".join((tmp_path / f"task{task}.{start + number}").read_text() for task in (0, 1))  # noqa: E731
    kept = []
    for number, asked in enumerate((lambda job: job.send_signal(signal.SIGUSR1), lambda job: ask_launchers(tmp_path))):
        running = submit(number, **({"SLURM_RESTART_COUNT": "1"} if number else {}))
        before = lines()
        while running.poll() is None and lines() < before + 3:
            time.sleep(0.1)
        asked(running)
        assert running.wait(timeout=120) == 1, said(number)
        assert (tmp_path / "requeued").read_text().split()[number:] == [str(start + number)]
        assert said(number).count("asked to stop (SIGTERM)") == 1
        assert not (tmp_path / "run" / "summary.json").exists()
        kept.append(lines())
    assert submit(2, SLURM_RESTART_COUNT="2").wait(timeout=300) == 0, said(2)
    assert "resuming the run in run" in said(1) and "resuming the run in run" in said(2)
    epochs = [line["epoch"] for line in metrics_of(tmp_path / "run")]
    assert epochs == [1, *range(1, 26)] and 2 < kept[0] < kept[1] < 26
    assert (tmp_path / "run" / "summary.json").exists() and len((tmp_path / "requeued").read_text().split()) == 2


def ask_launchers(folder):
    """As SLURM does when a pre-emption leaves time."""
    for launcher in (folder / "launchers").read_text().split():
        os.kill(int(launcher), signal.SIGTERM)
