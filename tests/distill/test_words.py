"""none and None are null where a field may be None, and text everywhere else."""

import dataclasses
from typing import get_args, get_type_hints

import pytest

from distill import DistillConfig, SnnTrainingConfig, cli
from distill.config import EvaluationConfig, TeacherTrainingConfig
from distill.prediction import PredictionConfig
from distill.words import recipe_with_nulls

NONES = ["none", "None", "null"]


def parsed(*argv, config_class=DistillConfig):
    return cli.parse(config_class, list(argv))


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def found(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("word", NONES)
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("run.save_every", "5 min"),  # a text
        ("run.dir", "somewhere"),
        ("train.clip", "1.5"),
        ("run.threads", "2"),
        ("data.in_memory", "true"),
        ("run.mixed_precision", "bf16"),  # a choice
        ("teacher.mean", "[0.5]"),
        ("student_taps", "{layer1: layer2}"),
    ],
)
def test_a_field_that_may_be_none_is(name, other, word, tmp_path):
    group, _, key = name.rpartition(".")
    lines = f"{group}:\n  {key}: {word}  # why\n" if group else f"{key}: {word}\n"
    for argv in (
        [f"--{name}={word}"],
        [f"--{name}", word],
        [f"--{name}", other, f"--{name}", word],
        recipe(tmp_path, lines),
        *([[f"--{group}", f"{{{key}: {word}}}"]] if group else []),
    ):
        config, _, text, _ = parsed(*argv)
        assert found(config, name) is None, argv
        assert f"{key}: null" in text  # as the run keeps it


@pytest.mark.parametrize(
    ("config_class", "name"), [(DistillConfig, "loss.feature"), (SnnTrainingConfig, "loss.gradient_scale")]
)
def test_where_none_is_a_choice_it_stays_one(config_class, name, tmp_path):
    group, key = name.split(".")
    for argv in ([f"--{name}", "none"], [f"--{name}=none"], recipe(tmp_path, f"{group}: {{{key}: none}}")):
        assert found(parsed(*argv, config_class=config_class).config, name) == "none"


@pytest.mark.parametrize(
    ("argv", "name", "expected"),
    [
        (["--run.name", "none"], "run.name", "none"),  # a text that there must be
        (["--taps", "[none, None]"], "taps", ["none", "None"]),
        (["--run.trackers", "[]"], "run.trackers", []),
        (["--teacher.kwargs", "{act_layer: none}"], "teacher.kwargs", {"act_layer": "none"}),
        (["--teacher.kwargs", "{clip: none, act_layer: null}"], "teacher.kwargs", {"clip": "none", "act_layer": None}),
        (["--student_taps", "{layer1: none}"], "student_taps", {"layer1": "none"}),
        (["--run.dir", "./none"], "run.dir", "./none"),
        (["--run.dir", "None-2"], "run.dir", "None-2"),
    ],
)
def test_elsewhere_none_is_text(argv, name, expected, tmp_path):
    assert found(parsed(*argv).config, name) == expected
    option, value = argv
    *groups, key = option.removeprefix("--").split(".")
    text = f"{key}: {value}" if not groups else f"{groups[0]}: {{{key}: {value}}}"
    assert found(parsed(*recipe(tmp_path, text)).config, name) == expected


def test_a_recipe_keeps_text_in_quotes_and_is_else_what_was_written():
    text = "run: {dir: 'none', save_every: None}\n# none\ntrain:\n  clip: none\n  lr: 1e-3\nteacher.weights: none\n"
    expected = text.replace("save_every: None", "save_every: null").replace("clip: none", "clip: null")
    assert recipe_with_nulls(text, DistillConfig) == expected.replace("weights: none", "weights: null")


@pytest.mark.parametrize("text", ["run: [", "none", "", "&a {run: *a}", "a: none\n---\nb: none", "? [x]\n: none"])
def test_what_is_no_recipe_stays_as_it_is(text):
    assert recipe_with_nulls(text, DistillConfig) == text


def test_a_value_that_a_positional_argument_has_stays(tmp_path):
    config = cli.parse(PredictionConfig, ["--early_exit", "none", "--model", "x", "none"], positional="images").config
    assert config.images == ["none"] and config.early_exit is None


def fields_with_none(config_class, prefix=""):
    for name, kind in get_type_hints(config_class).items():
        if dataclasses.is_dataclass(kind):
            yield from fields_with_none(kind, f"{prefix}{name}.")
        elif type(None) in get_args(kind):
            yield prefix + name


@pytest.mark.parametrize("config_class", [DistillConfig, SnnTrainingConfig, TeacherTrainingConfig, EvaluationConfig])
def test_every_field_that_may_be_none_takes_the_word(config_class):
    names = list(fields_with_none(config_class))
    argv = [word for name in names for word in (f"--{name}", "none")]
    needed = ["--model", "x"] if config_class is EvaluationConfig else []
    config = parsed(*argv, *needed, config_class=config_class).config
    assert len(names) > 10 and [name for name in names if found(config, name) is not None] == []
