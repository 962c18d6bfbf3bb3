"""What may differ between two configurations of a run."""

import pytest

from distill.config_changes import changed_fields, flatten


def test_flatten():
    nested = {"a": {"b": {"c": 1}, "d": []}, "e": {}, "f": None}
    assert flatten(nested) == {"a.b.c": 1, "a.d": [], "e": {}, "f": None}


@pytest.mark.parametrize(
    ("changes", "allowed", "found"),
    [
        ({"train": {"lr": 0.2, "epochs": 3}}, (), ["train.lr"]),
        ({"train": {"lr": 0.2, "epochs": 4}}, ("train.lr",), ["train.epochs"]),
        ({"train": {"lr": 0.2, "epochs": 4}}, ("train",), []),
        ({"run": {"dir": "elsewhere", "seed": 0}}, (), []),
        ({"run": {"dir": None, "seed": 1}}, (), ["run.seed"]),
        ({"new": 1}, (), ["new"]),
        ({"adapter": "conv1x1"}, (), []),  # what runs had before there was a choice
        ({"adapter": "norm"}, (), ["adapter"]),
    ],
)
def test_fields_that_are_in_the_way_of_resuming(changes, allowed, found):
    saved = {"train": {"lr": 0.1, "epochs": 3}, "run": {"dir": None, "seed": 0}}
    assert changed_fields(saved, saved | changes, allowed) == found
