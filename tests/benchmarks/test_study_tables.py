"""What the tables say of the records, and the targets that they judge."""

import json

import pytest
from toy_study import TAUGHT, leave, line_with

from benchmarks.study import __main__ as program
from benchmarks.study import ablation_tables, cells, records, tables
from benchmarks.study.comparing import accuracies, chance, equals, mean, spread, targets


def test_the_table_has_the_figures_worked_out_by_hand(study):
    text = tables.study(records.read(study), {}, [], "python -m x")
    kd = line_with(text, "`kd`")
    assert kd[2:9] == ["A", "3", "60.40 [60.00, 60.80]", "-", "4", "12.5", "25.0"]  # 20 uJ of the teacher's 80
    assert kd[9:] == [
        "150.0",
        "90.50 [90.00, 91.00]",
        "2.5",
        "5.0*",
        "16.0",
        "900",
        "abc1234, def5678",
    ]  # 300 of 200 uJ; 150 s, 300 s
    assert line_with(text, "`joint`", "| A |")[3:6] == ["2", "62.10 [62.00, 62.20]", "81.00 / 72.00"]
    assert line_with(text, "`joint`", "| B |")[3:9] == ["1", "62.70", "81.00 / 72.00", "4", "12.5", "12.5"]
    versions = "python 3.11, torch 2.9."
    assert f"Machine A: a processor, 1 thread; {versions}\nMachine B: another, 1 thread; {versions}\nTimes, im" in text
    assert line_with(text, "`joint`", "| A |")[10] == "-"  # runs of before it was kept
    assert line_with(text, "| from the teacher's weights, logit KD | 30.40")[1:] == [
        "30.40 [30.00, 30.80]",
        "**60.40 [60.00, 60.80]**",
    ]
    assert "- `bptt`, seed 0: layer1.0.act1 0.60 %" in text and "act1 24.4" not in text
    assert "Every row: 2 epochs of 1,200 images in batches of 32, learning rate 0.001 after 5 steps of warm-up" in text
    assert "Of `scratch`, `bptt` the learning rate is 0.03. Of `kd`, `joint` the learning rate is 0.002. " in text
    assert "evaluated on all test images" in text and "Left out" not in text
    assert "`tet`" not in text


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
    text = ablation_tables.ablations(records.read(study), "")
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
    lucky = dict(records.read(study)[-1], row="stochastic", top1=70.0)  # one seed
    assert targets([*records.read(study), lucky], {})[0].found == found[0].found
    text = tables.study(records.read(study), {}, [], "")
    assert [line_with(text, what)[2] for what in ("| joint 62.30, kd", "| scratch 40.00, bptt")] == [
        "yes",
        "**no**, within chance",
    ]
    alone = [record for record in records.read(study) if record["seed"] == 0]
    # of one seed, and 10,000 images: sqrt((62 38 + 60.5 39.5) / 10000) = 0.69, joint 1.5 above, 2.0 wanted
    assert chance(accuracies(alone), 62.0, 60.5, 10_000) == pytest.approx(0.689, abs=5e-4)
    assert targets(alone, {})[0].found.endswith("+1.50") and targets(alone, {})[0].by_chance
    just = [
        record | {"top1": {"joint": 84.1, "kd": 83.6 + 1e-13}.get(record["row"], record["top1"])} for record in alone
    ]
    assert targets(just, {})[1].met  # means of seeds are rounded
    few = [record for record in records.read(study) if record["row"] == "scratch"]
    assert [target.met for target in targets(few, {})] == [None] * 6
    assert targets(few, {})[0].found == "not measured: joint, teacher_weights"


def test_hybrids_are_judged_against_the_weights_as_they_are_too_where_these_were_run(study, tmp_path):
    leave(tmp_path / "more", "teacher_weights-labels_init-teacher", top1=60.0)
    records.collect(tmp_path / "more", "short", study.parent)
    text = tables.study(records.read(study), {}, [], "")
    name = "teacher_weights-labels_init-teacher"
    assert line_with(text, "weights as they are")[1:] == [f"joint 62.30, {name} 60.00: +2.30", "yes, within chance"]
    assert f"`{name}`" not in text and len(targets(records.read(study), {})) == 7


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
    assert line_with(text, "0.2 of BPTT's memory")[1:] == ["0.250", "**no**"] and "ResNet-18 of width 32" in text


def test_networks_of_another_width_have_no_times_of_these(study):
    records = (study.parent / "short_no.jsonl").read_text().replace('"scale": "short"', '"scale": "wide"')
    (study.parent / "wide_no.jsonl").write_text(records)
    for width, found in ((32, "not measured"), (64, "0.500")):
        times = {"width": width, "ratios": {"time": 0.5, "memory": 0.25}}
        (study.parent / "timing_no.json").write_text(json.dumps(times))
        program.main(["table", "--scale", "wide", "--results", str(study.parent)])
        text = (study.parent / "wide_no.md").read_text()
        assert found in line_with(text, "0.55 of BPTT's time")[1] and "ResNet-18 of width 64" in text


def test_an_ablations_table_has_the_differences(tmp_path, capsys):
    runs = tmp_path / "runs"
    for seed, top1 in enumerate([62.0, 63.0]):
        leave(runs, "joint", seed, top1, **TAUGHT)
    leave(runs, "joint-temperature-1", top1=61.0, **TAUGHT)
    program.main(["table", "--runs", str(runs), "--scale", "short", "--results", str(tmp_path / "r"), "--ablations"])
    text = (tmp_path / "r" / "short_no_ablations.md").read_text()
    assert line_with(text, "4 (default)")[1:7] == [
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
    for seed, top1 in enumerate([50.0, 53.0]):  # in no table of ablations, but it is what seeds do
        leave(runs, "teacher_weights", seed, top1)
    program.main(["table", "--runs", str(runs), "--scale", "short", "--results", str(tmp_path / "r"), "--ablations"])
    text = (tmp_path / "r" / "short_no_ablations.md").read_text()
    assert "3.00 points, the largest range of a row's seeds (`teacher_weights`)" in text


def test_a_table_of_nothing_says_where_it_looked(tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["table", "--results", str(tmp_path)])
    assert "there is no full_*.jsonl in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.main(["table", "--runs", str(tmp_path / "none"), "--results", str(tmp_path)])
    assert "is no folder" in capsys.readouterr().err


def test_a_gpu_is_the_machine_where_there_is_one():
    record = {"cpu": "a processor", "threads": 2}
    assert [cells.machine_of(record | more) for more in ({}, {"gpu": None}, {"gpu": "a GPU"})] == [
        "a processor, 2 threads",
        "a processor, 2 threads",
        "a GPU, a processor",
    ]
