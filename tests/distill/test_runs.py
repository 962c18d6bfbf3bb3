"""What lies in the folder of a run is whole at every moment; when a checkpoint is due."""

import json
from pathlib import Path

import pytest

from distill import RunConfig
from distill.runs import RunFolder, replace_text, saving_of


def test_metrics_are_one_json_object_a_line_and_can_be_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    folder.drop_metrics(lambda line: False)  # before there are any
    for epoch in (1, 2, 3):
        folder.append_metrics({"stage": "student", "epoch": epoch})
    folder.drop_metrics(lambda line: line["epoch"] <= 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"stage": "student", "epoch": epoch} for epoch in (1, 2)]
    folder.append_metrics({"epoch": 3})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics({"epoch": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lo')  # the power went off
    folder.drop_metrics(lambda line: line["epoch"] <= 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'


def test_the_summary_is_json(tmp_path):
    RunFolder(tmp_path).write_summary({"top1": {1: 50.0}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"top1": {"1": 50.0}}


def test_a_file_is_replaced_in_one_move(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_text(path, "old")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        replace_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("text", "steps", "seconds", "due"),
    [
        ("2 min", 1, 119.0, False),
        ("2 min", 1, 120.0, True),
        ("0.5min", 3, 30.0, True),
        ("3 steps", 5, 1e9, False),
        ("3 steps", 6, 0.0, True),
        (None, 6, 1e9, False),
    ],
)
def test_when_a_checkpoint_is_due(text, steps, seconds, due):
    assert saving_of(RunConfig(save_every=text)).due(steps, seconds) == due


@pytest.mark.parametrize("text", ["", "15", "min", "0 steps", "0 min", "1.5 steps", "15 hours"])
def test_other_words_for_it_are_refused(text):
    with pytest.raises(ValueError, match="save_every"):
        RunConfig(save_every=text)
