"""The files in configs/: each parses, and states only what differs from the defaults."""

from pathlib import Path

import pytest
import yaml

from distill import DistillConfig, cli
from distill.config import TeacherTrainingConfig
from distill.runs import flatten

FOLDER = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
NAMES = {"run.name", "teacher.name", "data.name"}  # may be said for the reader's sake


def config_class(path):
    return TeacherTrainingConfig if path.stem.endswith("_teacher") else DistillConfig


def parsed(path):
    root = ["--data.root", "images"] if "folder" in path.read_text() else []  # which a recipe cannot know
    return cli.parse(config_class(path), ["--config", str(path), *root])


def test_there_are_recipes():
    assert {path.name for path in RECIPES} >= {"digits.yaml", "digits_teacher.yaml", "cifar10_resnet18.yaml"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_parses_into_what_it_says(path):
    config, _, text = parsed(path)
    assert isinstance(config, config_class(path))
    resolved = flatten(yaml.safe_load(text))
    for key, value in flatten(yaml.safe_load(path.read_text())).items():
        assert resolved[key] == value


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_states_only_what_differs_from_the_defaults(path):
    defaults = flatten(yaml.safe_load(cli.parse(config_class(path), [])[2]))
    stated = flatten(yaml.safe_load(path.read_text()))
    assert {key for key, value in stated.items() if key not in NAMES and defaults.get(key) == value} == set()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_begins_with_a_comment_that_says_what_it_is_for(path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_teachers_recipe_makes_the_teacher_that_the_distillation_expects(name):
    teacher = parsed(FOLDER / f"{name}_teacher.yaml")[0]
    (distillation,) = (path for path in RECIPES if path.stem.startswith(name) and path.stem[-7:] != "teacher")
    config = parsed(distillation)[0]
    assert config.teacher == teacher.teacher and config.data == teacher.data
    assert config.teacher_train == teacher.train
