"""The files in configs/: each parses, and states only what differs from the defaults."""

import runpy
from pathlib import Path

import pytest
import yaml

from distill import DistillConfig, SnnTrainingConfig, cli
from distill.config import TeacherTrainingConfig
from distill.config_changes import flatten
from distill.data.event_config import EVENTS
from distill.teachers import teacher_preprocessing

FOLDER = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "accelerate")
NAMES = {"run.name", "teacher.name", "data.name"}  # may be said for the reader's sake


def config_class(path):
    kinds = {"teacher": TeacherTrainingConfig, "snn": SnnTrainingConfig, "feedback": SnnTrainingConfig}
    return next((kinds[word] for word in path.stem.split("_") if word in kinds), DistillConfig)


def parsed(path):
    reads_files = yaml.safe_load(path.read_text())["data"]["name"] in ("folder", *EVENTS)
    root = ["--data.root", "images"] if reads_files else []  # which a recipe cannot know
    return cli.parse(config_class(path), ["--config", str(path), *root])


def test_there_are_recipes():
    names = {
        "digits",
        "digits_teacher",
        "digits_snn",
        "cifar10_resnet18",
        "imagenet_resnet34",
        "pretrained",
        "snn_cifar10",
        "snn_cifar100",
        "snn_imagenet",
        "nmnist",
        "snn_nmnist",
        "snn_cifar10dvs",
        "feedback_digits",
        "feedback_nmnist",
        "feedback_cifar10",
    }
    assert {path.stem for path in RECIPES} >= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_parses_into_what_it_says(path):
    config, _, text, _ = parsed(path)
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
    (distillation,) = (p for p in RECIPES if p.stem.startswith(name) and config_class(p) is DistillConfig)
    config = parsed(distillation)[0]
    assert config.teacher == teacher.teacher and config.data == teacher.data
    assert config.teacher_train == teacher.train


def test_the_script_starts_from_it_where_a_teacher_is_pretrained(monkeypatch):
    script = runpy.run_path(str(FOLDER.parent / "scripts" / "distill.py"))
    seen = []
    monkeypatch.setattr(script["distillation"], "run", lambda config, *_: seen.append(config))
    monkeypatch.setattr(script["session"], "start", lambda *_: None)
    for words in ([], ["--teacher.pretrained", "true", "--data.root", "images"]):
        monkeypatch.setattr("sys.argv", ["distill.py", *words])
        script["main"]()
    assert [config.run.name for config in seen] == ["digits", "pretrained"]
    assert [config.student.init for config in seen] == ["teacher", "calibrated"]


def test_any_pretrained_teacher_starts_and_learns_as_what_won_on_cifar10():
    ours, cifar10, imagenet = (
        parsed(FOLDER / f"{name}.yaml")[0] for name in ("pretrained", "cifar10_resnet18", "imagenet_resnet34")
    )
    assert (ours.student, ours.init, ours.loss) == (cifar10.student, cifar10.init, cifar10.loss)
    assert (ours.train.lr, ours.train.batch_size) == (cifar10.train.lr, cifar10.train.batch_size)
    assert ours.train.weight_decay == imagenet.train.weight_decay and ours.data.hflip == imagenet.data.hflip
    assert ours.teacher.pretrained and not ours.train.freeze_norms and ours.run.mixed_precision == "bf16"


def test_imagenet_starts_and_learns_as_what_won_on_cifar10():
    ours, cifar10 = (parsed(FOLDER / f"{name}.yaml")[0] for name in ("imagenet_resnet34", "cifar10_resnet18"))
    assert (ours.student, ours.init, ours.loss) == (cifar10.student, cifar10.init, cifar10.loss)
    assert not ours.train.freeze_norms and ours.teacher.pretrained and 8 * ours.train.batch_size == 256
    assert ours.train.lr / 256 == cifar10.train.lr / cifar10.train.batch_size
    preprocessing = teacher_preprocessing(ours.teacher)  # timm's entry of the weights: torchvision's
    assert preprocessing.input_size == (3, 224, 224) and preprocessing.crop_pct == 0.875
    assert preprocessing.interpolation == "bilinear" and preprocessing.mean == (0.485, 0.456, 0.406)


PAPER = {  # Yu et al., NeurIPS 2024, appendix: network, images a step on all processes, rate, decay, epochs
    "snn_cifar10": ("resnet18_cifar", 128, 1, 0.1, 5e-4, 300),
    "snn_cifar100": ("resnet18_cifar", 128, 1, 0.1, 5e-4, 300),
    "snn_imagenet": ("sew_resnet34", 512, 8, 0.2, 2e-5, 100),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_have_the_papers_hyper_parameters(name):
    config = parsed(FOLDER / f"{name}.yaml")[0]
    network, images, processes, lr, decay, epochs = PAPER[name]
    train, student = config.train, config.student
    assert (student.name, student.timesteps, student.width, student.algorithm) == (network, 4, None, "rate_m")
    assert (train.lr, train.weight_decay, train.epochs, train.momentum) == (lr, decay, epochs, 0.9)
    assert train.batch_size * train.accumulate * processes == images and train.optimizer == "momentum"
    assert config.loss.gradient_scale == "1/T" and config.loss.name == "ce"
    neuron = student.neuron
    assert (neuron.leak, neuron.threshold, neuron.reset, neuron.alpha) == (0.2, 1.0, "soft", 4.0)


def test_the_recipe_of_cifar10_dvs_has_the_authors_hyper_parameters():
    config = parsed(FOLDER / "snn_cifar10dvs.yaml")[0]
    train, student, data = config.train, config.student, config.data
    assert (student.name, student.timesteps, student.width, student.algorithm) == ("vggsnn_dvs", 10, None, "rate_m")
    assert (train.lr, train.weight_decay, train.epochs, train.momentum) == (0.1, 5e-4, 300, 0.9)
    assert train.batch_size * train.accumulate == 128 and train.optimizer == "momentum"
    assert config.ann.input_size == [2, 48, 48] and (data.hflip, data.event_shift) == (0.5, 5)


def test_the_recipe_of_a_feedback_network_has_the_authors_hyper_parameters():
    config = parsed(FOLDER / "feedback_cifar10.yaml")[0]
    train, student, data = config.train, config.student, config.data
    assert (student.name, student.timesteps, student.width, student.algorithm) == ("feedback_alexnet", 30, None, "ide")
    assert (train.lr, train.weight_decay, train.epochs, train.momentum) == (0.05, 5e-4, 100, 0.9)
    assert (train.batch_size * train.accumulate, train.warmup_steps, train.optimizer) == (128, 400, "momentum")
    assert (student.neuron.leak, student.neuron.threshold, student.feedback.dropout) == (1.0, 2.0, 0.2)
    assert student.feedback.backward_timesteps == 250 and (data.crop_padding, data.hflip) == (4, 0.5)
