"""The study: what its rows run, what is kept of a run, and what the tables say of it."""

import argparse
import dataclasses
import fcntl
import itertools
import json

import pytest
import torch

from benchmarks import machine
from benchmarks.study import __main__ as program
from benchmarks.study import ablations, records, running, tables, timing
from benchmarks.study.ablations import ABLATION_ROWS, ABLATIONS, ALL_ROWS
from benchmarks.study.comparing import accuracies, chance, equals, mean, spread, targets
from benchmarks.study.conversion import ConversionConfig
from benchmarks.study.rows import BEST, HYBRIDS, ROWS, SCALES, changed
from benchmarks.study.running import Place, RowFailed, command, run_row
from distill import cli
from distill.config import DistillConfig, SnnTrainingConfig, TeacherTrainingConfig
from distill.schedules import stages_of

CONFIGS = {
    "train_snn": SnnTrainingConfig,
    "distill": DistillConfig,
    "train_teacher": TeacherTrainingConfig,
    "convert": ConversionConfig,
}


def place_in(tmp_path):
    return Place(
        runs=tmp_path / "runs",
        data=tmp_path / "data",
        teacher=tmp_path / "teacher.safetensors",
        scale="short",
        precision="no",
        threads=1,
    )


@pytest.fixture
def place(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
    (tmp_path / "teacher.safetensors").touch()
    return place_in(tmp_path)


def config_of(name, place, seed=0):
    words = command(place, ALL_ROWS[name], seed, place.folder(name, seed))
    words = words[words.index("--config") :]
    words[1] = str(running.REPOSITORY / words[1])
    return cli.parse(CONFIGS[ALL_ROWS[name].script], words).config


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ALL_ROWS)
def test_every_rows_command_line_is_understood(name, scale, place):
    row, place = ALL_ROWS[name], dataclasses.replace(place, scale=scale)
    words = command(place, row, 3, place.folder(name, 3))
    start = words.index("--config")
    assert words[:start] == (
        ["-m", "benchmarks.study.conversion"] if row.script == "convert" else [f"scripts/{row.script}.py"]
    )
    config = config_of(name, place, 3)
    ann = config.ann if row.script == "train_snn" else config.teacher
    assert ann.weights == (str(place.teacher) if row.teacher else None)
    assert ann.kwargs == {"channels": [32, 64, 128, 256]} and config.run.seed == 3 and config.run.threads == 1
    epochs, images = {"short": (3, 10240), "full": (6, None)}[scale]
    assert config.train.epochs == epochs and config.data.max_train_samples == images and config.data.hflip == 0.5
    if row.script == "distill" and isinstance(config.taps, list):
        assert sum(stage.epochs for stage in stages_of(config.schedule, config.taps, epochs)) == epochs


@pytest.mark.parametrize("name", ["scratch", "bptt", "tet", "ann", "joint_sew"])
def test_fresh_weights_take_large_steps_and_learn_their_statistics(name, place):
    config = config_of(name, place)
    assert config.train.lr == 0.03 and not config.train.freeze_norms
    assert config_of(name, dataclasses.replace(place, scale="full")).train.lr == 0.1


@pytest.mark.parametrize("name", ["teacher_weights", "kd", *HYBRIDS, f"{BEST}_t8"])
def test_twins_start_calibrated_and_take_small_steps(name, place):
    config = config_of(name, place)
    assert config.student.init == "calibrated" and config.train.freeze_norms and config.train.lr == 0.001
    assert config.student.neuron.leak == 0.5 and not config.student.neuron.detach_reset
    assert name in ("teacher_weights", "kd") or config.init.adapters == "regression"


def test_the_remedies_lead_from_the_first_setting_to_the_default():
    names = ablations.ABLATIONS["remedies"].rows("remedies")
    changed = [
        {key for key, value in ALL_ROWS[name].arguments.items() if ROWS["joint"].arguments.get(key) != value}
        for name in names
    ]
    assert changed[0] == {*ablations._FIRST} and changed[-1] == {"train.lr", "train.freeze_norms"}
    assert all(later < earlier for earlier, later in itertools.pairwise(changed[:2] + changed[3:]))
    assert not any("remedies" in name for name in ablations.ablation_rows("full"))
    assert {*ablations.ablation_rows("short")} == ABLATION_ROWS.keys()


def test_rows_derived_from_the_best_differ_in_what_they_say():
    assert ROWS[f"{BEST}_t8"].arguments == ROWS[BEST].arguments | {"student.timesteps": "8"}
    assert [row.seeds for row in (ROWS[f"{BEST}_t8"], ROWS["kd"], ROWS["bptt"])] == [1, 3, 1]
    blocks = changed(ROWS["progressive"], "", "", {"taps": "blocks"})
    assert blocks.arguments["taps"] == "blocks" and blocks.at_scale == {"short": {"schedule.epochs": "[1, 2]"}}
    assert ABLATION_ROWS["scratch-gradient_scale-1_over_T"].script == "train_snn"
    for group, ablation in ABLATIONS.items():
        assert list(ablation.rows(group).values()) == list(ablation.changes)


def arguments(place, *more):
    return [
        *("run", *more, "--data", str(place.data), "--teacher", str(place.teacher), "--runs", str(place.runs)),
        *("--scale", "short", "--precision", "no", "--threads", "1"),
    ]


PROGRAM = """
import json, pathlib, signal, sys, time
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True, exist_ok=True)
if how == "fails":
    print("one\\rtwo")
    sys.exit("script.py: error: no such thing")
if how == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / "ready").touch()
    time.sleep(60)
(folder / "summary.json").write_text("{}")
"""


@pytest.fixture
def fake(monkeypatch):
    """Rows run a program of three lines; `how` says what it does, by row."""
    how, real = {}, running.command

    def fake_command(place, row, seed, folder):
        name = next(name for name, known in ALL_ROWS.items() if known is row)
        return ["-c", PROGRAM, str(folder), how.get(name, "ends"), *real(place, row, seed, folder)[1:]]

    monkeypatch.setattr(running, "command", fake_command)
    monkeypatch.setattr(running, "POLL", 0.01)
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)  # pytest keeps its own
    return how


def test_rows_that_fail_do_not_keep_the_others_from_running(place, fake, capsys):
    fake["scratch"] = "fails"
    with pytest.raises(SystemExit) as end:
        program.main(arguments(place, "scratch", "kd", "bptt", "--seeds", "0"))
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert "ended with status 1" in printed.err and "    two\n    script.py: error: no such thing\n" in printed.err
    assert "1 of 3 runs failed: scratch, seed 0" in printed.err.splitlines()[-1]
    assert [place.is_done(name, 0) for name in ("scratch", "kd", "bptt")] == [False, True, True]
    fake["scratch"] = "ends"
    program.main(arguments(place, "scratch", "kd", "bptt", "--seeds", "0"))
    assert capsys.readouterr().out.splitlines() == [f"1/1: scratch, seed 0: {place.folder('scratch', 0)}"]
    kept = running.read_record(place.folder("scratch", 0))
    assert [p["status"] for p in kept["processes"]] == [1, 0] and [p["resumed"] for p in kept["processes"]] == [0, 1]
    assert kept["wall_seconds"] == sum(p["seconds"] for p in kept["processes"])
    assert kept["peak_rss_mb"] == max(p["peak_rss_mb"] for p in kept["processes"]) > 1
    assert kept["finished"] and kept["row"] == "scratch" and kept["threads"] == 1


def test_ctrl_c_asks_the_run_to_save_and_notes_what_it_took(place, fake, monkeypatch):
    fake["kd"] = "waits"
    folder = place.folder("kd", 0)

    def interrupted(seconds):
        if (folder / "ready").exists():
            (folder / "ready").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(running.time, "sleep", interrupted)
    with pytest.raises(SystemExit) as end:
        program.main(arguments(place, "kd", "bptt", "--seeds", "0"))
    assert end.value.code == 130
    (process,) = running.read_record(folder)["processes"]
    assert process["status"] == 75 and process["seconds"] > 0 and not place.is_done("kd", 0)
    assert not place.folder("bptt", 0).exists()


def test_the_cost_is_noted_while_a_run_lasts(place, fake, monkeypatch):
    fake["kd"] = "waits"
    folder, seen = place.folder("kd", 0), []
    monkeypatch.setattr(running, "NOTE", 0.0)

    def look(seconds):
        record = running.read_record(folder)
        if record is not None and not seen:
            seen.append(record)
            raise KeyboardInterrupt

    monkeypatch.setattr(running.time, "sleep", look)
    with pytest.raises(KeyboardInterrupt):
        run_row(place, "kd", 0)
    assert seen[0]["processes"][0]["status"] is None and not seen[0]["finished"]
    assert seen[0]["wall_seconds"] > 0 and seen[0]["peak_rss_mb"] > 1


def test_a_run_whose_end_nobody_noted_is_gone_on_with(place, fake):
    run_row(place, "kd", 0)
    folder = place.folder("kd", 0)
    record = running.read_record(folder)
    (folder / "study.json").write_text(json.dumps(record | {"finished": False}))
    assert not place.is_done("kd", 0)
    (folder / "study.json").unlink()
    assert not place.is_done("kd", 0)
    run_row(place, "kd", 0)
    assert place.is_done("kd", 0) and running.read_record(folder)["processes"][0]["resumed"]


def test_a_row_runs_once_at_a_time(place, fake):
    log = place.folder("kd", 0).parent / "seed0.log"
    log.parent.mkdir(parents=True)
    with log.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RowFailed, match="row kd, seed 0: another process runs it"):
            run_row(place, "kd", 0)
    run_row(place, "kd", 0)
    assert place.is_done("kd", 0)


def test_a_mistyped_command_leaves_no_folder(place, monkeypatch):
    monkeypatch.setattr(running, "command", lambda *_: ["-c", "raise SystemExit(2)"])
    monkeypatch.setattr(running, "POLL", 0.01)
    with pytest.raises(RowFailed, match="status 2"):
        run_row(place, "kd", 0)
    assert not place.folder("kd", 0).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["kdd"], "unknown rows ['kdd']; known are ['scratch', 'teacher_weights', 'kd'"),
        (["--scale", "long"], "choose from full, short"),
        (["--data", "nowhere"], "nowhere must hold train.tar, or a folder train"),
        (["--teacher", "nothing"], "nothing is no file"),
        (["--threads", "0"], "--threads must be at least 1, found 0"),
    ],
)
def test_a_mistake_ends_with_one_clear_line(change, message, place, capsys):
    words = arguments(place)
    with pytest.raises(SystemExit) as end:
        program.main([*words, *change])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1].replace("'full', 'short'", "full, short")


def test_runs_of_another_precision_are_not_taken_for_ones_own(place, fake, capsys):
    program.main(arguments(place, "kd", "--seeds", "0"))
    with pytest.raises(SystemExit):
        program.main([*arguments(place, "kd", "--seeds", "0"), "--precision", "bf16"])
    assert "holds a run of precision no, found --precision bf16" in capsys.readouterr().err


def test_runs_of_a_row_as_it_was_are_not_taken_for_ones_own(place, fake, capsys, monkeypatch):
    program.main(arguments(place, "kd", "--seeds", "0"))
    program.main(arguments(place, "kd", "--seeds", "0"))
    row = ALL_ROWS["kd"]
    other = {"student.neuron.leak": "0.9", "loss.temperature": "3"}
    monkeypatch.setitem(ALL_ROWS, "kd", dataclasses.replace(row, arguments={**row.arguments, **other}))
    with pytest.raises(SystemExit):
        program.main(arguments(place, "kd", "--seeds", "0"))
    assert "loss.temperature not given, now 3, student.neuron.leak 0.5, now 0.9; give" in capsys.readouterr().err


def test_a_seed_of_all_rows_comes_before_the_next():
    found = program._runs(["kd", "bptt", "joint"], None)
    assert found == [("kd", 0), ("bptt", 0), ("joint", 0), ("kd", 1), ("joint", 1), ("kd", 2), ("joint", 2)]
    assert program._runs(["kd", "bptt"], [4]) == [("kd", 4), ("bptt", 4)]


def leave(runs, row, seed=0, top1=50.0, cpu="a processor", old=False, lr=0.001, **summary):
    """A run folder as a finished run leaves it."""
    folder = runs / "short" / row / f"seed{seed}"
    folder.mkdir(parents=True)
    values = {
        "student_top1": top1,
        "timesteps": 4,
        "student_top1_by_timesteps": {"1": top1 - 30, "4": top1},
        "mean_firing_rate": 0.125,
        "firing_rates": {"act1": 0.244, "layer1.0.act1": 0.006},
        "frontier": [
            {"network": "student", "timesteps": 1, "compute_uj": 7.0, "memory_uj": 70.0},
            {"network": "student", "timesteps": 4, "compute_uj": 20.0, "memory_uj": 300.0},
        ],
        "versions": {"python": "3.11", "torch": "2.9"},
    }
    (folder / "summary.json").write_text(json.dumps(values | summary))
    train = {"epochs": 2, "batch_size": 32, "lr": lr, "warmup_steps": 5}
    config = {"train": train, "data": {"max_train_samples": 1200, "max_eval_samples": None}}
    (folder / "config.yaml").write_text(json.dumps(config))
    lines = [
        {"stage": "student", "train_seconds": 60.0, "images": 1200, "student_top1": top1 - 10},
        {"stage": "student", "train_seconds": 90.0, "images": 1200, "student_top1": top1},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"row": row, "seed": seed, "scale": "short", "precision": "no", "threads": 1, "cpu": cpu}
    if old:
        record |= {"last_process_seconds": 240.0, "resumed": False, "peak_rss_mb": 1000.0, "commit": "old1234"}
    else:
        processes = [
            {"commit": "abc1234", "resumed": False, "seconds": 100.0, "peak_rss_mb": 900.0, "status": 75},
            {"commit": "def5678", "resumed": True, "seconds": 200.0, "peak_rss_mb": 800.0, "status": 0},
        ]
        record |= {"processes": processes, "wall_seconds": 300.0, "peak_rss_mb": 900.0, "finished": True}
    (folder / "study.json").write_text(json.dumps(record))
    return folder


TAUGHT = {
    "teacher_top1": 87.5,
    "hybrid_top1": {"layer1": 81.0, "layer2": 72.0},
    "frontier": [
        {"network": "teacher", "timesteps": None, "compute_uj": 80.0, "memory_uj": 200.0},
        {"network": "hybrid/layer1", "timesteps": 4, "compute_uj": 60.0, "memory_uj": 210.0},
        {"network": "student", "timesteps": 4, "compute_uj": 10.0, "memory_uj": 400.0},
    ],
}


def test_a_record_holds_what_the_run_folder_says(tmp_path):
    found = records.record_of(leave(tmp_path, "joint", seed=2, top1=61.23456789, **TAUGHT))
    assert found["row"] == "joint" and found["seed"] == 2 and found["commit"] == "abc1234, def5678"
    assert found["top1"] == 61.2346 and found["teacher_top1"] == 87.5 and found["timesteps"] == 4
    assert found["hybrid_top1"] == {"layer1": 81.0, "layer2": 72.0} and found["processes"] == 2
    energies = [found[f"{who}{kind}_uj"] for who in ("", "teacher_") for kind in ("compute", "memory")]
    assert energies == [10.0, 400.0, 80.0, 200.0]
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
    old = json.loads(json.dumps(records.record_of(newer)))
    old["ended"], old["top1"] = "2020-01-01T00:00:00+00:00", 1.0
    assert records.newest([*records.read(file), old]) == records.read(file)


def line_with(text, *parts):
    (line,) = [line for line in text.splitlines() if line.startswith("|") and all(part in line for part in parts)]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def study(tmp_path):
    """Three seeds of kd and joint, one of others; joint's third on another machine."""
    runs, results = tmp_path / "runs", tmp_path / "results"
    for seed, (kd, joint) in enumerate([(60.0, 62.0), (60.4, 62.2), (60.8, 62.7)]):
        leave(runs, "kd", seed, kd, teacher_top1=87.5)
        leave(runs, "joint", seed, joint, cpu="another" if seed == 2 else "a processor", **TAUGHT)
    leave(runs, "teacher_weights", top1=60.5)
    leave(runs, "scratch", top1=40.0, lr=0.03)
    leave(runs, "bptt", top1=41.25, lr=0.03)
    records.collect(runs, "short", results)
    return records.file_of(results, "short", "no")


def test_the_table_has_the_figures_worked_out_by_hand(study):
    text = tables.study(records.read(study), {}, [], "python -m x")
    kd = line_with(text, "`kd`")
    assert kd[2:9] == ["A", "3", "60.40 [60.00, 60.80]", "-", "4", "12.5", "25.0"]  # 20 uJ of the teacher's 80
    assert kd[9:] == ["150.0", "2.5", "5.0*", "16.0", "900", "abc1234, def5678"]  # 300 of 200 uJ; 150 s, 300 s
    assert line_with(text, "`joint`", "| A |")[3:6] == ["2", "62.10 [62.00, 62.20]", "81.00 / 72.00"]
    assert line_with(text, "`joint`", "| B |")[3:9] == ["1", "62.70", "81.00 / 72.00", "4", "12.5", "12.5"]
    assert "Machine A: a processor, 1 thread.\nMachine B: another, 1 thread.\nTimes, images/s" in text
    assert line_with(text, "| + logit KD | 30.40")[1:] == ["30.40 [30.00, 30.80]", "**60.40 [60.00, 60.80]**"]
    assert "- `bptt`, seed 0: layer1.0.act1 0.60 %" in text and "act1 24.4" not in text
    assert "Every row: 2 epochs of 1,200 images in batches of 32, learning rate 0.001 after 5 steps of warm-up" in text
    assert "Of `scratch`, `bptt` the learning rate is 0.03. " in text
    assert "evaluated on all test images" in text and "Left out" not in text
    assert "`tet`" not in text and "Versions: python 3.11, torch 2.9. " in text


def test_runs_of_other_settings_are_left_out(study, tmp_path):
    leave(tmp_path / "more", "teacher_weights", seed=1, lr=0.2)
    leave(tmp_path / "more", "tet", lr=0.2)  # says 0.03 itself
    leave(tmp_path / "more", "ann", lr=0.03)
    leave(tmp_path / "more", "joint-lr-0.01", lr=0.01)
    records.collect(tmp_path / "more", "short", study.parent)
    text = tables.study(records.read(study), {}, [], "")
    assert "run with other settings: `teacher_weights`, `tet`." in text and "| `tet` |" not in text
    assert "| `ann` |" in text
    for row in ("joint-remedies-first", "joint-remedies-then_calibrated", "kd-kd_remedies-first"):
        for seed in range(3):  # more than there are of the common rate
            leave(tmp_path / "more", row, seed, lr=0.03)
    records.collect(tmp_path / "more", "short", study.parent)
    text = tables.ablations(records.read(study), "")
    assert line_with(text, "`joint-lr-0.01`")[0] == "0.01" and "Left out" not in text
    assert line_with(text, "`joint-remedies-first`")[:2] == ["first", "`joint-remedies-first`"]


def test_differences_smaller_than_the_spread_of_the_seeds_are_none(study):
    found = accuracies(records.read(study))
    assert spread(found) == pytest.approx(0.8)  # kd: 60.8 - 60.0; joint: 0.7
    assert equals(found) == {"teacher_weights": ["kd"]}  # 60.5 and 60.4; scratch and bptt are 1.25 apart
    text = tables.study(records.read(study), {}, [], "")
    assert "Spread of the seeds: 0.80 points, the largest range of a row's seeds (`kd`)" in text
    assert "- `teacher_weights` and `kd`\n" in text
    alone = [record for record in records.read(study) if record["seed"] == 0]
    assert spread(accuracies(alone)) is None and equals(accuracies(alone)) == {}
    assert "unknown, since no row has several seeds" in tables.study(alone, {}, [], "")


def test_targets_are_judged_by_the_means(study):
    found = targets(records.read(study), {"time": 0.54, "memory": 0.26})
    assert [target.met for target in found] == [False, True, False, False, True, False]
    # the spread of the seeds is 0.8 points; these two are 0.2 and 0.25 from their targets
    assert [target.by_chance for target in found] == [True, False, False, True, False, False]
    assert found[0].found == "joint 62.30, teacher_weights 60.50: +1.80"  # below 2.0
    assert found[1].found == "joint 62.30, kd 60.40: +1.90"
    assert found[2].found == "joint 62.30, the teacher 87.50: -25.20"
    assert found[3].found == "scratch 40.00, bptt 41.25: -1.25"
    text = tables.study(records.read(study), {}, [], "")
    assert [line_with(text, what)[2] for what in ("| joint 62.30, kd", "| scratch 40.00, bptt")] == [
        "yes",
        "**no**, within chance",
    ]
    alone = [record for record in records.read(study) if record["seed"] == 0]
    # of one seed, and 10,000 images: sqrt((62 38 + 60.5 39.5) / 10000) = 0.69, joint 1.5 above, 2.0 wanted
    assert chance(accuracies(alone), 62.0, 60.5, 10_000) == pytest.approx(0.689, abs=5e-4)
    assert targets(alone, {})[0].found.endswith("+1.50") and targets(alone, {})[0].by_chance
    few = [record for record in records.read(study) if record["row"] == "scratch"]
    assert [target.met for target in targets(few, {})] == [None] * 6
    assert targets(few, {})[0].found == "not measured: joint, teacher_weights"


def test_a_mean_is_unknown_where_one_of_its_values_is():
    assert mean([1.0, None]) is None and mean([]) is None
    assert mean([1.0, 2.0]).text() == "1.50 [1.00, 2.00]" and mean([1.001, 1.002]).text() == "1.00"


def test_the_command_writes_table_and_plots(study, capsys):
    program.main(["table", "--scale", "short", "--results", str(study.parent)])
    written = capsys.readouterr().out.split()
    assert [path.rpartition("/")[2] for path in written] == ["short_no.md", "short_no_epochs.svg", "short_no_time.svg"]
    svg = (study.parent / "short_no_epochs.svg").read_text()
    assert svg.startswith("<svg") and "prefers-color-scheme: dark" in svg and "#f1" not in svg and len(svg) < 60_000
    assert "At the end: rate_m 40.00, teacher's weights 60.50, logit KD 60.40, joint 62.30, BPTT 41.25." in svg
    assert "minutes of training (a processor, 1 thread)" in (study.parent / "short_no_time.svg").read_text()
    text = (study.parent / "short_no.md").read_text()
    assert "![accuracy over epochs](short_no_epochs.svg)" in text
    (study.parent / "timing_no.json").write_text(json.dumps({"ratios": {"time": 0.5, "memory": 0.25}}))
    program.main(["table", "--scale", "short", "--results", str(study.parent)])
    text = (study.parent / "short_no.md").read_text()
    assert line_with(text, "0.55 of BPTT's time")[1:] == ["0.500", "yes"]
    assert line_with(text, "0.2 of BPTT's memory")[1:] == ["0.250", "**no**"]


def test_an_ablations_table_has_the_differences(tmp_path, capsys):
    runs = tmp_path / "runs"
    for seed, top1 in enumerate([62.0, 63.0]):
        leave(runs, "joint", seed, top1, **TAUGHT)
    leave(runs, "joint-temperature-1", top1=61.0, **TAUGHT)
    program.main(["table", "--runs", str(runs), "--scale", "short", "--results", str(tmp_path / "r"), "--ablations"])
    text = (tmp_path / "r" / "short_no_ablations.md").read_text()
    assert line_with(text, "2 (default)")[1:7] == [
        "`joint`",
        "A",
        "2",
        "62.50 [62.00, 63.00]",
        "+0.00",
        "81.00 / 72.00",
    ]
    # of the same seed: 62.0
    assert line_with(text, "`joint-temperature-1`")[4:6] == ["61.00", "-1.00"]
    assert text.count("## ") == 1 and "1.00 points, the largest range of a row's seeds (`joint`)" in text


def test_a_table_of_nothing_says_where_it_looked(tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["table", "--results", str(tmp_path)])
    assert "there is no full_*.jsonl in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.main(["table", "--runs", str(tmp_path / "none"), "--results", str(tmp_path)])
    assert "is no folder" in capsys.readouterr().err


def test_ratios_of_time_and_memory_by_hand():
    seconds = {"scratch": [1.0, 2.0, 3.0], "bptt": [2.0, 2.0, 4.0]}  # ratios 0.5, 1 and 0.75
    peaks = {"scratch": [100.0, 124.0], "bptt": [150.0, 270.0]}  # 0.5 and 2.5 MB an image
    assert timing.ratios(seconds, peaks, [16, 64]) == {"time": 0.75, "memory": pytest.approx(0.2)}
    assert timing.ratios({"kd": [1.0]}, {}, [16, 64]) == {}
    result = {
        **{"settings": "", "batch": 32, "memory_batches": [16, 64], "seconds": seconds, "peaks_mb": peaks},
        "ratios": timing.ratios(seconds, peaks, [16, 64]),
    }
    text = timing.markdown(result)
    row = ["bptt", "2000 [2000, 3000]", "16.0", "1.33 [1.17, 1.67]", "150", "270", "2.50"]
    assert line_with(text, "| bptt") == row  # ratios 2, 1 and 1.33
    assert "rate_m takes 0.750 of BPTT's time (target: at most 0.55)." in text
    assert "rate_m takes 0.200 of BPTT's memory an image (target: at most 0.2)." in text


@pytest.mark.parametrize("name", ["progressive, up to layer2", "stochastic", "tet"])
def test_a_rows_step_is_timed(name):
    options = argparse.Namespace(width=8, precision="no")
    step = timing.Step(name, 2, options)
    norms = {n: m.training for n, m in step.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    # as their rows do: twins keep the calibrated statistics, adapters and fresh networks do not
    assert all(training == (name == "tet" or "adapters" in n) for n, training in norms.items()) and norms
    assert step.step(0) > 0
    trained = {n for n, p in step.model.named_parameters() if p.grad is not None}
    if name == "tet":
        assert "fc.weight" in "".join(trained) and step.draws == 1
    elif name == "stochastic":
        assert step.draws == 3 and len([n for n in trained if "adapters" in n and "conv" in n]) == 1
    else:
        assert not any("layer3" in n or "adapters.2" in n for n in trained) and any("layer2.1" in n for n in trained)


@pytest.mark.slow
def test_a_row_that_is_cut_off_goes_on_and_conversions_leave_run_folders(tmp_path, monkeypatch):
    import torch
    from PIL import Image

    import models
    from models.io import save_weights

    for split, count in (("train", 8), ("test", 4)):
        for label in "abc":
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "data" / split / label / f"{number}.png")
    ann = models.create_ann("resnet18", 3, cifar_stem=True, kwargs={"channels": [8, 8, 8, 8]})
    save_weights(ann, tmp_path / "teacher.safetensors")
    monkeypatch.setitem(running.NETWORK, "kwargs", "{channels: [8, 8, 8, 8]}")
    monkeypatch.setitem(running.NETWORK, "min_top1", "0")
    small = {"train.epochs": "2", "train.batch_size": "4", "run.save_every": "1 steps", "run.compile": "false"}
    monkeypatch.setitem(running.SCALES["short"].__dict__, "arguments", small)
    place = place_in(tmp_path)
    folder, sleep = place.folder("kd", 0), running.time.sleep

    def interrupted(seconds):
        if any(folder.glob("checkpoints/student/epoch_*")):
            running.time.sleep = sleep
            raise KeyboardInterrupt
        sleep(0.1)

    monkeypatch.setattr(running.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_row(place, "kd", 0)
    assert not place.is_done("kd", 0)
    for name in ("kd", "convert_if", "convert_spikingjelly"):
        run_row(place, name, 0)
        assert place.is_done(name, 0)
    processes = running.read_record(folder)["processes"]
    assert [p["status"] for p in processes] == [75, 0] and [p["resumed"] for p in processes] == [False, True]
    records.collect(place.runs, "short", tmp_path / "results")
    found = {r["row"]: r for r in records.read(records.file_of(tmp_path / "results", "short", "no"))}
    assert found["kd"]["curve"][-1][0] == 2 and found["kd"]["wall_seconds"] > found["kd"]["train_seconds"]
    for name in ("convert_if", "convert_spikingjelly"):
        assert list(found[name]["top1_by_timesteps"]) == ["4", "8", "16", "32"] and found[name]["curve"] == []
        assert found[name]["teacher_compute_uj"] > 0 and 0 <= found[name]["firing_rate"] <= 1
    assert found["convert_if"]["compute_uj"] > 0 and found["convert_spikingjelly"]["compute_uj"] is None
