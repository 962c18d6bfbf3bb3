"""The benchmark of a training step: one line of JSON, what it counts, and the table made of such lines."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import models
from benchmarks import compare, measure, plan, table, training_step
from benchmarks.contestants import Settings, contestant
from benchmarks.measure import Step, saved_bytes
from benchmarks.peers import authors, spikingjelly
from distill.allocator import LARGE_PAGES
from distill.cuda_graphs import GRAPHED
from models import small_maps

ROOT = Path(__file__).resolve().parents[2]
TINY = {"width": 8, "image_size": 8, "batch": 2, "timesteps": 2, "compiled": False}
POSITIVE = (
    *("images_per_second", "step_ms", "forward_ms", "backward_ms", "peak_memory_mb", "saved_activation_mb"),
    *("non_convolution_share", "threads", "loss"),
)


def test_a_run_prints_one_line_with_every_figure():
    script = str(ROOT / "benchmarks" / "training_step.py")
    small = ["--width=8", "--image-size=16", "--batch=2", "--warmup=1", "--steps=2", "--threads=1", "--no-compile"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *small], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    row = json.loads(line)
    assert row | {"network": "resnet18_cifar", "algorithm": "rate_m", "precision": "fp32", "compiled": False} == row
    assert row | {"timesteps": 4, "batch": 2, "device": "cpu", "threads": 1, "peer": None} == row
    assert all(row[name] > 0 for name in POSITIVE)
    assert row["step_ms_spread"]["quartile_1"] <= row["step_ms"] <= row["step_ms_spread"]["quartile_3"]
    assert row["forward_ms"] + row["backward_ms"] < 1.5 * row["step_ms"]
    assert row["non_convolution_share"] < 1
    assert row["images_per_second"] == pytest.approx(2000 / row["step_ms"])
    assert {"torch", "spikingjelly", "cpu", "amx_bf16", "avx512_bf16"} <= set(row["versions"])


def test_convolutions_of_small_maps_count_as_such_with_their_copies(monkeypatch):
    assert measure.SMALL_MAPS == small_maps.PROFILED_AS
    monkeypatch.setattr(small_maps, "PAIRS", 0)
    monkeypatch.setattr(small_maps, "PAIRS_OF_WEIGHT", 0)
    settings = Settings(**TINY | {"batch": 16}, algorithm="rate_m")
    step = Step(contestant(settings), settings, torch.device("cpu"))
    with profile(activities=[ProfilerActivity.CPU]) as run:
        step()
    inside = [event.name for event in run.events() if measure._in_small_maps(event)]
    assert inside.count(measure.SMALL_MAPS) >= 2 and {"aten::mm", "aten::copy_", "aten::add_"} <= set(inside)
    outside = [event.name for event in run.events() if not measure._in_small_maps(event)]
    assert "aten::mkldnn_convolution" in outside  # the first stage has larger maps, which are no products
    monkeypatch.setattr(measure, "_in_small_maps", lambda event: True)
    assert step.non_convolution_share() < 0.1  # all of it would be convolution


def test_the_peak_is_that_of_the_timed_steps(monkeypatch):
    happened, step = [], Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self: happened.append("step") or step(self))
    monkeypatch.setattr(measure, "forget_peak_memory", lambda device: happened.append("forget"))
    monkeypatch.setattr(measure, "peak_memory_mb", lambda device: happened.append("peak") or 1.0)
    measure.measure(Settings(**TINY, algorithm="rate_m", warmup=2, steps=3))
    assert happened[:7] == ["step"] * 2 + ["forget"] + ["step"] * 3 + ["peak"]


@pytest.fixture(scope="module")
def saved():
    """MB saved by a step of each rule, after one step."""

    def of(algorithm, **settings):
        tiny = Settings(**TINY | {"algorithm": algorithm} | settings)
        step = Step(contestant(tiny), tiny, torch.device("cpu"))
        assert all(seconds > 0 for seconds in step().values())
        assert step.checked_loss() > 0
        return step.saved_activation_mb()

    return {algorithm: of(algorithm) for algorithm in plan.ALGORITHMS} | {
        "T = 4": of("rate_m", timesteps=4),
        "bptt, T = 4": of("bptt", timesteps=4),
        "SpikingJelly's bptt": of("bptt", peer="spikingjelly"),
    }


def test_every_rule_runs(saved):
    assert plan.ALGORITHMS + models.FEEDBACK_ALGORITHMS == models.ALGORITHMS
    assert plan.GRAPHED == GRAPHED
    assert all(megabytes > 0 for megabytes in saved.values())


def test_what_rate_m_keeps_does_not_grow_with_time_and_what_bptt_keeps_does(saved):
    assert saved["T = 4"] == pytest.approx(saved["rate_m"], rel=0.02)
    assert saved["bptt, T = 4"] > 1.8 * saved["bptt"]
    assert saved["SpikingJelly's bptt"] > saved["rate_m"]


def test_spikingjellys_network_with_our_weights_gives_our_logits_and_gradient():
    settings = Settings(**TINY | {"algorithm": "bptt", "peer": "spikingjelly"})
    peer, ours = spikingjelly(settings), models.create_snn("resnet18_cifar", timesteps=2, algorithm="bptt", width=8)
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):  # all modules with parameters, in the same order
        own, theirs = ([m for m in network.modules() if isinstance(m, kind)] for network in (ours, peer.network))
        for mine, their in zip(own, theirs, strict=True):
            their.load_state_dict(mine.state_dict())
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = ours.double().train()(images)
    peer.network.double().train()
    found = peer.logits(images, 0)
    torch.testing.assert_close(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    gradient = next(iter(peer.network.parameters())).grad
    torch.testing.assert_close(gradient, ours.conv0[0].weight.grad)


def test_saved_bytes_of_a_function_worked_out_by_hand():
    layer = nn.Linear(3, 2, bias=False)
    x = torch.randn(5, 3, requires_grad=True)
    with saved_bytes(layer) as count:
        y = layer(x)  # keeps x, 60 bytes, and its weight, which does not count
        z = x.exp()  # keeps its result, 60 bytes
        w = z * z  # keeps z twice: the same storage
        forgotten = y.sigmoid()  # keeps its result, 40 bytes
        held = count()
        del forgotten
    assert (held, count()) == (160, 120)
    (w.sum() + y.sum()).backward()
    assert x.grad is not None


def test_casts_of_parameters_do_not_count():
    layer = nn.Linear(64, 32)
    with saved_bytes(layer) as count, torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(2, 64))
    assert count() == 2 * 64 * 2  # the images in bfloat16, not the weight's 64 * 32 * 2
    y.float().sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision=int8"], "invalid choice: 'int8'"),
        (["--network=resnet19"], "known are"),
        (["--algorithm=backprop"], "rate_m"),
        (["--steps=1"], "steps must be at least 2, found 1"),
        (["--compare", "--only=speed,spead"], "speed, headline, memory, growth"),
        (["--peer=authors"], "git clone https://github.com/Tab-ct/rate-based-backpropagation"),
    ],
)
def test_a_mistake_ends_with_one_clear_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv(LARGE_PAGES, "1")  # which `main` sets
    monkeypatch.setattr(sys, "argv", ["training_step.py", *arguments])
    with pytest.raises(SystemExit) as end:
        training_step.main()
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert message in printed.err.splitlines()[-1]


def test_every_contestant_asks_for_the_large_pages_that_scripts_ask_for(monkeypatch):
    monkeypatch.setenv(LARGE_PAGES, "0")
    monkeypatch.delenv(LARGE_PAGES)
    monkeypatch.setattr(sys, "argv", ["training_step.py", "--steps=1"])
    with pytest.raises(SystemExit):
        training_step.main()
    assert os.environ[LARGE_PAGES] == "1"


def test_every_contestant_keeps_freed_memory_as_scripts_do(monkeypatch):
    asked = []
    monkeypatch.setattr(
        training_step.runpy, "run_path", lambda path: {"keep_memory": lambda: asked.append(Path(path).name)}
    )
    monkeypatch.setattr(sys, "argv", ["training_step.py", "--steps=1"])
    with pytest.raises(SystemExit):
        training_step.main()
    assert asked == ["allocator.py"]


def test_missing_code_of_a_peer_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--authors-path DIR is needed; to get it: git clone"):
        authors(Settings(peer="authors"))
    with pytest.raises(FileNotFoundError, match=r"holds no model/model_setting.py"):
        authors(Settings(peer="authors", authors_path=tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_setting.py").touch()
    with pytest.raises(FileNotFoundError, match=r"--sj14-path DIR is needed; to get it: pip install --no-deps"):
        authors(Settings(peer="authors", authors_path=tmp_path))
    with pytest.raises(ValueError, match=r"must be one of \('bptt',\), found 'rate_m'"):
        spikingjelly(Settings(peer="spikingjelly"))


def result(
    peer, algorithm, speed, *, batch=32, peak=1000.0, saved=64.0, timesteps=4, precision="fp32", fmt="contiguous"
):
    return {
        **{"network": "resnet18_cifar", "peer": peer, "algorithm": algorithm, "images_per_second": speed},
        **{"batch": batch, "peak_memory_mb": peak, "saved_activation_mb": saved, "timesteps": timesteps},
        **{"precision": precision, "memory_format": fmt, "step_ms": 1000 * batch / speed, "compiled": True},
        **{"step_ms_spread": {"quartile_1": 1.0, "quartile_3": 2.0}, "forward_ms": 3.0, "backward_ms": 4.0 * timesteps},
        **{"non_convolution_share": 0.25, "cpu_share": 0.99, "device": "cpu", "threads": 1, "warmup": 3, "steps": 10},
        "versions": {"torch": "2.15.0", "cpu": "a processor", "amx_bf16": False, "avx512_bf16": False},
    }


def record(group, row, repeat=0, **other):
    key = f"{group} {row['peer']} {row['algorithm']} {row['batch']} {row['memory_format']} {repeat}"
    common = {"key": key, "group": group, "repeat": repeat, "command": "python", "commit": "abc", "platform": "Linux"}
    return common | {"measured": "2026-01-01T00:00:00+00:00", "result": row} | other


def line_with(text, *parts):
    (line,) = [line for line in text.splitlines() if all(part in line for part in parts)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_holds_the_ratios_worked_out_by_hand():
    failed = {**record("speed", result(None, "dsr", 1.0)), "error": "ValueError: no"}
    del failed["result"]
    records = [
        record("speed", result(None, "rate_m", 40.0, fmt="channels_last")),
        record("speed", result("authors", "rate_m", 16.0)),
        record("speed", result("authors", "rate_m", 20.0, fmt="channels_last")),
        failed,
    ]
    for i, (ours, theirs) in enumerate([(40.0, 20.0), (45.0, 15.0), (50.0, 20.0)]):
        records.append(record("headline", result(None, "rate_m", ours), i))
        records.append(record("headline", result("authors", "rate_m", theirs), i))
        records.append(record("headline", result("authors", "rate_m", 5.0, precision="bf16"), i))
    for peer, slope in ((None, 7.0), ("authors", 28.0)):
        for batch in (16, 64):
            row = result(peer, "rate_m", 10.0, batch=batch, peak=500 + slope * batch, saved=2.0 * batch)
            records.append(record("memory", row))
    for timesteps in (16, 2):
        records.append(record("growth", result(None, "rate_m", 10.0, timesteps=timesteps)))
    text = table.markdown(records, "python benchmarks/training_step.py --compare")
    assert line_with(text, "SpikeSwap", "40.0", "channels_last")[7] == "2.00"  # 40 over the faster 20
    assert line_with(text, "authors' code", "16.0")[7] == "0.80"
    assert line_with(text, "2.00, 3.00, 2.50")[2:] == [
        *("25, 25, 25", "fp32, contiguous", "20.0, 15.0, 20.0", "2.00, 3.00, 2.50", "**2.50**")
    ]
    assert line_with(text, "bf16, contiguous")[4:] == ["5.0, 5.0, 5.0", "8.00, 9.00, 10.00", "**9.00**"]
    assert line_with(text, "SpikeSwap", "612", "948")[7:] == ["7.00", "0.25", "2.00"]
    assert line_with(text, "authors' code", "2292")[7:] == ["28.00", "1.00", "2.00"]
    assert line_with(text, "64.0 (8.00)")[0] == "16" and "8.0 (1.00)" in text  # 4 ms a step of time
    assert f"- `{failed['key']}`: ValueError: no" in text
    assert "a processor, no native bfloat16, 1 thread(s)" in text


def options(tmp_path, **changed):
    made = {
        **{"network": "resnet18_cifar", "timesteps": 4, "batch": 32, "width": None, "image_size": 32, "warmup": 3},
        **{"steps": 10, "threads": 1, "device": "cpu", "seed": 0, "compiled": True, "precisions": "fp32", "repeats": 2},
        **{
            "algorithms": None,
            "formats": None,
            "only": "headline",
            "fresh": False,
            "timeout": 60.0,
            "out": tmp_path / "out" / "table.md",
        },
        **{"authors_path": tmp_path / "theirs", "sj14_path": None},
    }
    return argparse.Namespace(**made | changed)


ON_CPU = {"precisions": ["fp32"], "algorithms": ["rate_m"], "formats": ["contiguous"]}


def test_a_row_that_exists_is_not_measured_again_and_a_failed_one_is(tmp_path, monkeypatch):
    commands = []

    def child(command, **kwargs):
        if not command[1].endswith("training_step.py"):
            return subprocess.CompletedProcess(command, 0, "abc", "")
        commands.append(command)
        if "--peer=authors" in command:
            message = f"a warning\ntraining_step.py: error: nothing at {tmp_path / 'theirs'}\n"
            return subprocess.CompletedProcess(command, 2, "", message)
        return subprocess.CompletedProcess(command, 0, json.dumps(result(None, "rate_m", 10.0)), "")

    monkeypatch.setattr(compare.subprocess, "run", child)
    assert "4 rows, 2 failed" in compare.compare(options(tmp_path), ROOT)
    assert ["--peer=authors" in command for command in commands] == [False, True, False, True]
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "nothing at AUTHORS" in written and str(tmp_path) not in written
    compare.compare(options(tmp_path), ROOT)
    assert len(commands) == 6  # the two that failed
    compare.compare(options(tmp_path, fresh=True), ROOT)
    assert len(commands) == 10


def test_the_plan_takes_the_peers_faster_setting(tmp_path):
    chosen = options(tmp_path, precisions=["fp32"], algorithms=["bptt", "rate_m"], formats=["contiguous"])
    speed = [(row.peer, row.algorithm, row.memory_format) for row in plan.rows("speed", chosen, [])]
    ours = [(None, "bptt", "channels_last"), (None, "rate_m", "channels_last")]
    assert speed == ours + [(peer, rule, "contiguous") for peer, rule in plan.PEERS]
    fast = result("authors", "rate_m", 20.0, fmt="channels_last")
    records = [record("speed", result("authors", "rate_m", 16.0)), record("speed", fast)]
    assert {row.memory_format for row in plan.rows("headline", chosen, records) if row.peer} == {"channels_last"}
    assert {row.memory_format for row in plan.rows("headline", chosen, []) if row.peer} == {"contiguous"}
    assert [row.peer for row in plan.rows("headline", chosen, [])] == [None, "authors"] * 2
    memory = plan.rows("memory", chosen, records)
    assert {row.batch for row in memory} == {16, 64}
    checkpointed = [(row.algorithm, row.batch) for row in memory if "--grad-checkpointing" in row.arguments(chosen)]
    assert checkpointed == [("rate_m", 16), ("rate_m", 64), ("bptt", 16), ("bptt", 64)]
    assert {tuple(sorted(row.environment)) for row in memory} == {("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
    assert [row.timesteps for row in plan.rows("growth", chosen, [])] == [2, 4, 8, 16]


def test_the_authors_have_their_turn_in_each_precision_in_the_format_that_is_its_faster_one(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.machine, "has_native_bfloat16", lambda: True)
    chosen = options(tmp_path, **ON_CPU | {"precisions": ["fp32", "bf16"]})
    speeds = {("fp32", "contiguous"): 20.0, ("fp32", "channels_last"): 16.0}
    speeds |= {("bf16", "contiguous"): 25.0, ("bf16", "channels_last"): 28.0}
    records = [record("speed", result("authors", "rate_m", v, precision=p, fmt=f)) for (p, f), v in speeds.items()]
    turns = [(row.repeat, row.peer, row.precision, row.memory_format) for row in plan.rows("headline", chosen, records)]
    assert turns == [
        (i, *turn)
        for i in range(2)
        for turn in (
            (None, "fp32", "channels_last"),
            (None, "bf16", "channels_last"),
            ("authors", "fp32", "contiguous"),
            ("authors", "bf16", "channels_last"),
        )
    ]


def test_on_a_gpu_ours_run_as_graphs_too_and_alone_in_turns(tmp_path):
    chosen = options(
        tmp_path, device="cuda", precisions=["bf16"], algorithms=["rate_m", "ottt"], formats=["contiguous"]
    )
    ours = {group: [row for row in plan.rows(group, chosen, []) if row.peer is None] for group in plan.GROUPS}
    speed = [(row.algorithm, row.cuda_graphs) for row in ours["speed"]]
    assert speed == [("rate_m", False), ("ottt", False), ("rate_m", True)]
    assert all(row.cuda_graphs for row in ours["headline"])
    assert not any(row.cuda_graphs for row in ours["memory"] + ours["growth"])
    assert ["--cuda-graphs" in row.arguments(chosen) for row in ours["speed"]] == [False, False, True]
    assert not any(
        row.cuda_graphs for group in plan.GROUPS for row in plan.rows(group, options(tmp_path, **ON_CPU), [])
    )


def test_what_cannot_be_seen_of_a_graph_is_a_dash():
    graphed = result(None, "rate_m", 40.0) | {"cuda_graphs": True, "device": "a GPU", "non_convolution_share": None}
    graphed |= {"peak_memory_mb": None, "saved_activation_mb": None}
    text = table.markdown([record("speed", graphed)], "python")
    found = line_with(text, "SpikeSwap, CUDA graphs")
    assert found[8:11] == ["800.0 [1.0, 2.0]", "3.0", "16.0"] and found[11:] == ["-", "-", "-", "99"]


def test_of_checkpointed_blocks_the_peak_is_measured():
    plain = [result(None, "rate_m", 9.0, batch=batch, peak=peak) for batch, peak in ((16, 100.0), (64, 196.0))]
    again = [
        result(None, "rate_m", 9.0, batch=batch, peak=peak, saved=None) for batch, peak in ((16, 90.0), (64, 114.0))
    ]
    rows = plain + [row | {"grad_checkpointing": True} for row in again]
    text = table.markdown([record("memory", row) for row in rows], "python")
    assert line_with(text, "SpikeSwap, checkpointed")[5:] == ["90", "114", "0.50", "-", "-"]
    assert line_with(text, "SpikeSwap |")[5:8] == ["100", "196", "2.00"]


def test_checkpointing_reaches_the_network():
    kinds = {"network": "sew_resnet18", "width": 8, "compiled": False}
    assert contestant(Settings(grad_checkpointing=True, **kinds)).network._checkpoints_blocks
    assert not contestant(Settings(**kinds)).network._checkpoints_blocks
    with pytest.raises(ValueError, match="are this repository's, not a peer's"):
        contestant(Settings(grad_checkpointing=True, peer="spikingjelly"))
    with pytest.raises(ValueError, match="gradient checkpointing goes with one of"):
        contestant(Settings(grad_checkpointing=True, algorithm="rate_s", **kinds))


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"device": "cuda", "algorithm": "ottt"}])
def test_graphs_need_a_gpu_and_a_rule_that_they_serve(change):
    with pytest.raises(ValueError, match="cuda_graphs needs device 'cuda' and an algorithm of"):
        contestant(Settings(cuda_graphs=True, **change))
