"""Rows are run one at a time, gone on with, and refused where they are others by now."""

import dataclasses
import fcntl
import json

import pytest
import torch
from toy_study import arguments, place_in

from benchmarks.study import __main__ as program
from benchmarks.study import records, running
from benchmarks.study.ablations import ALL_ROWS
from benchmarks.study.rows import NETWORK
from benchmarks.study.running import RowFailed, run_row

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


def test_rows_that_fail_do_not_keep_the_others_from_running(place, fake, capsys, monkeypatch):
    monkeypatch.setattr(running.machine, "gpu", lambda: "a GPU")
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
    assert kept["finished"] and kept["row"] == "scratch" and kept["threads"] == 1 and kept["gpu"] == "a GPU"


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
        # a process that has just begun may hold no more than a page
        if record is not None and record["peak_rss_mb"] > 1 and not seen:
            seen.append(record)
            raise KeyboardInterrupt

    monkeypatch.setattr(running.time, "sleep", look)
    with pytest.raises(KeyboardInterrupt):
        run_row(place, "kd", 0)
    assert seen[0]["processes"][0]["status"] is None and not seen[0]["finished"]
    assert seen[0]["wall_seconds"] > 0


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
        (["--scale", "tiny"], "choose from full, long, wide, wide_60, medium, short"),
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
    assert message.replace("'", "") in capsys.readouterr().err.splitlines()[-1].replace("'", "")


def test_runs_of_another_precision_are_not_taken_for_ones_own(place, fake, capsys):
    program.main(arguments(place, "kd", "--seeds", "0"))
    with pytest.raises(SystemExit):
        program.main([*arguments(place, "kd", "--seeds", "0"), "--precision", "bf16"])
    assert "holds a run of precision no, found --precision bf16" in capsys.readouterr().err


def test_runs_of_a_row_as_it_was_are_not_taken_for_ones_own(place, fake, capsys, monkeypatch):
    program.main(arguments(place, "kd", "--seeds", "0"))
    program.main(arguments(place, "kd", "--seeds", "0"))
    row = ALL_ROWS["kd"]
    other = {"student.neuron.leak": "0.9", "loss.label_smoothing": "0.1"}
    monkeypatch.setitem(ALL_ROWS, "kd", dataclasses.replace(row, arguments={**row.arguments, **other}))
    with pytest.raises(SystemExit):
        program.main(arguments(place, "kd", "--seeds", "0"))
    assert "loss.label_smoothing not given, now 0.1, student.neuron.leak 0.5, now 0.9; give" in capsys.readouterr().err


def test_a_seed_of_all_rows_comes_before_the_next():
    found = program._runs(["kd", "bptt", "joint"], None)
    assert found == [("kd", 0), ("bptt", 0), ("joint", 0), ("kd", 1), ("joint", 1), ("kd", 2), ("joint", 2)]
    assert program._runs(["kd", "bptt"], [4]) == [("kd", 4), ("bptt", 4)]


@pytest.mark.slow
def test_a_row_that_is_cut_off_goes_on_and_conversions_leave_run_folders(tmp_path, monkeypatch):
    from PIL import Image

    import models
    from models.io import save_weights

    for split, count in (("train", 8), ("test", 4)):
        for label in "abc":
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "data" / split / label / f"{number}.png")
    ann = models.create_ann("resnet18", 3, cifar_stem=True, kwargs={"channels": [8, 16, 32, 64]})
    save_weights(ann, tmp_path / "teacher.safetensors")
    monkeypatch.setitem(NETWORK, "min_top1", "0")
    monkeypatch.setitem(running.SCALES["short"].__dict__, "width", 8)
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
