"""The command line: each field is there, explained and checked; recipes first, then what the line says."""

import ast
import dataclasses
import inspect
import itertools
import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from distill import DistillConfig, SnnTrainingConfig, cli
from distill.config import EvaluationConfig, TeacherTrainingConfig
from distill.config_changes import flatten
from distill.steps import NonFiniteLossError
from models import UnsupportedOperationError

TRAIN = dict(
    epochs=3, batch_size=6, accumulate=2, optimizer="adamw", lr=0.5, min_lr=0.25, momentum=0.75, weight_decay=0.125,
    warmup_steps=5, clip=1.5, label_smoothing=0.0625, channels_last=False, cuda_graphs=False,
    mixup=0.25, cutmix=0.75, mixup_prob=0.875, mixup_switch_prob=0.375, ema=0.75, sync_bn=False, max_skipped_steps=1,
    find_batch_size=True, freeze_norms=True,
    grad_checkpointing=True,
)  # fmt: skip
SMOOTHED_BY_LOSS = {name: value for name, value in TRAIN.items() if name != "label_smoothing"}  # which must stay 0
OVERRIDES = {
    "run": dict(
        name="other", dir="somewhere", seed=7, trackers=["wandb"], mixed_precision="bf16", compile=False, threads=3,
        save_every="7 steps", keep_checkpoints=4,
    ),
    "data": dict(
        name="folder", root="images", train_split="a", eval_split="b", class_map="classes.txt", crop_padding=2,
        hflip=0.5, auto_augment="rand-m9", random_erasing=0.25, max_train_samples=10, max_eval_samples=11,
        in_memory=False, workers=1, random_resized_crop=False, download=False, on_corrupt="skip",
        synthetic_samples=100, synthetic_classes=5, cache=None, event_shift=0,
    ),
    "teacher": dict(
        name="resnet34", kwargs={"channels": [1, 2, 3, 4], "act_layer": "relu"}, cifar_stem=True, pretrained=False,
        weights="file.safetensors", input_size=[1, 8, 9], mean=[0.25], std=[0.5],
        interpolation="bicubic", crop_pct=0.75, crop_mode="squash", min_top1=12.5,
    ),
    "teacher_train": TRAIN,
    "student": dict(
        name="resnet18_cifar", width=8, timesteps=6, encoder="poisson", init="scratch", algorithm="bptt", gates="keep"
    ),
    "student.dsr": dict(
        model="lif", threshold=2.0, alpha=0.25, learn_threshold=False, grad_scaling=0.5, lower_bound=0.125, tau=3.0,
        delta_t=0.5,
    ),
    "student.feedback": dict(
        solver="broyden", tolerance=0.5, max_iterations=7, patience=3, bounded_norm="frobenius", bound=0.75,
        batch_norm=False, dropout=0.125, head_start=0.25, backward_timesteps=9, backward_threshold=0.75,
        gradient_scale=2.0, readout_side=4,
    ),
    "student.neuron": dict(leak=0.5, learnable_leak=True, threshold=2.0, reset="hard", detach_reset=False, alpha=3.0),
    "loss": dict(
        student_ce=0.5, student_kd=0.25, hybrid_ce=2.0, hybrid_kd=3.0, hybrid_feature=0.75, feature="cosine",
        tap_weights={"layer1": 0.5, "stages.0": 2.0}, temperature=4.0, label_smoothing=0.125,
    ),
    "init": dict(from_run="runs/other", calibration_images=5, percentile=99.5, adapters="regression"),
    "schedule": dict(name="progressive", epochs=[1, 2], restart_lr=False, freeze=True),
    "train": SMOOTHED_BY_LOSS,
}  # fmt: skip
PARTS_OF_BOTH = ("run", "data", "student", "student.dsr", "student.feedback", "student.neuron", "init")
SNN_OVERRIDES = {
    **{name: OVERRIDES[name] for name in PARTS_OF_BOTH},
    "ann": OVERRIDES["teacher"],
    "loss": dict(name="ce", label_smoothing=0.125, tet_lambda=0.5, tet_target=2.0, gradient_scale="1/T"),
    "train": SMOOTHED_BY_LOSS,
}
SECTIONS = [(DistillConfig, OVERRIDES, name) for name in OVERRIDES]
SECTIONS += [(SnnTrainingConfig, SNN_OVERRIDES, name) for name in SNN_OVERRIDES]
ALONE = {"data.random_resized_crop": True, "teacher.pretrained": True}  # not together with those above
TOP = {
    "taps": ["layer1", "stages.0"],
    "student_taps": {"stages.0": "layer2"},
    "adapter": "conv3x3",
    "save_hybrids": False,
    "eval_timesteps": [8],
}


def leaves(config_class, prefix=""):
    """Dotted name of each field that is no section, with the class that declares it."""
    for field in dataclasses.fields(config_class):
        made = getattr(config_class(), field.name)
        if dataclasses.is_dataclass(made):
            yield from leaves(type(made), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", config_class


LEAVES = dict(leaves(DistillConfig))


def docstrings(config_class):
    """The string below each field, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body
    return {
        field.target.id: inspect.cleandoc(doc.value.value)
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }


def options(values, section=""):
    prefix = f"--{section}." if section else "--"
    return [f"{prefix}{name}={json.dumps(value)}".replace('="', "=").rstrip('"') for name, value in values.items()]


def parse(argv, config_class=DistillConfig, **kwargs):
    return cli.parse(config_class, argv, **kwargs)


def refused(argv, capsys):
    """Status 2, no traceback; returns the message."""
    with pytest.raises(SystemExit) as raised:
        parse(argv)
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err and "error: " in captured.err
    return captured.err


def recipe(tmp_path, text, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_without_arguments_the_configuration_is_the_default():
    config, resume, *_ = parse([])
    assert config == DistillConfig() and resume is False


def test_every_field_has_an_override_in_these_tests():
    covered = {f"{section}.{name}" for section, values in OVERRIDES.items() for name in values} | TOP.keys()
    assert covered | {"train.label_smoothing"} == LEAVES.keys()
    covered = {f"{section}.{name}" for section, values in SNN_OVERRIDES.items() for name in values}
    assert covered | {"eval_timesteps", "train.label_smoothing"} == dict(leaves(SnnTrainingConfig)).keys()


@pytest.mark.parametrize(
    ("config_class", "overrides", "section"), SECTIONS, ids=[f"{c.__name__}-{name}" for c, _, name in SECTIONS]
)
def test_each_field_of_a_section_can_be_set_on_the_command_line(config_class, overrides, section):
    config, _, text, _ = parse(options(overrides[section], section), config_class)
    found = config
    for part in section.split("."):
        found = getattr(found, part)
    assert {name: getattr(found, name) for name in overrides[section]} == overrides[section]
    # and nothing else has moved
    changed = {k for k, v in flatten(dataclasses.asdict(config)).items()
               if flatten(dataclasses.asdict(config_class())).get(k) != v}  # fmt: skip
    assert {key for key in changed if not key.startswith(f"{section}.")} == set()
    assert yaml.safe_load(text) == dataclasses.asdict(config)


@pytest.mark.parametrize("field", ALONE)
def test_fields_that_exclude_others_can_be_set_too(field):
    config, *_ = parse(options({field: ALONE[field]}))
    section, name = field.split(".")
    assert getattr(getattr(config, section), name) == ALONE[field]


def test_the_fields_of_event_data_can_be_set():
    values = {"name": "nmnist", "root": "events", "cache": "frames", "event_shift": 3}
    data = parse(options(values, "data"))[0].data
    assert {name: getattr(data, name) for name in values} == values


def test_fields_outside_of_sections_can_be_set():
    config, _, text, _ = parse(options(TOP))
    assert {name: getattr(config, name) for name in TOP} == TOP
    assert {name: yaml.safe_load(text)[name] for name in TOP} == TOP


@pytest.fixture(scope="module")
def help_text():
    lines = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as raised:
        patch.setattr(sys, "stdout", type("Out", (), {"write": lines.append, "flush": lambda self: None})())
        parse(["--help"])
    assert raised.value.code == 0
    text = "".join("".join(lines).split())  # without white space: argparse breaks lines, also at hyphens
    usage, found, _ = text.partition("".join(DistillConfig.__doc__.split()))
    assert found
    return text[len(usage) :]


@pytest.mark.parametrize("field", LEAVES)
def test_the_help_explains_the_field(field, help_text):
    doc = docstrings(LEAVES[field]).get(field.rpartition(".")[2])
    assert doc, f"{field} has no docstring"
    assert f"--{field}" in help_text
    start = help_text.index(f"--{field}")
    following = help_text[start : start + 700]
    assert "".join(doc.split()) in following


def test_the_help_says_what_the_program_does_and_how_to_resume(help_text):
    for text in (DistillConfig.__doc__, "--resume", "--config"):
        assert "".join(text.split()) in help_text


def test_the_teachers_command_line_has_its_own_fields():
    config, resume, *_ = parse(["--train.epochs", "3", "--resume"], TeacherTrainingConfig)
    assert isinstance(config, TeacherTrainingConfig) and config.train.epochs == 3 and resume is True
    with pytest.raises(SystemExit):
        parse(["--student.timesteps", "3"], TeacherTrainingConfig)


def test_a_recipe_states_differences_and_the_command_line_has_the_last_word(tmp_path):
    path = recipe(tmp_path, "train: {epochs: 3, lr: 0.5}\nstudent: {neuron: {leak: 1.0}}\n")
    config, *_ = parse(["--config", path, "--train.lr", "0.25"])
    assert (config.train.epochs, config.train.lr, config.student.neuron.leak) == (3, 0.25, 1.0)
    default = DistillConfig()
    neuron = dataclasses.replace(default.student.neuron, leak=1.0)
    assert config == dataclasses.replace(
        default,
        train=dataclasses.replace(default.train, epochs=3, lr=0.25),
        student=dataclasses.replace(default.student, neuron=neuron),
    )


def test_a_second_recipe_goes_on_top_of_the_first(tmp_path):
    first = recipe(tmp_path, "train: {epochs: 3, lr: 0.5}\n", "first.yaml")
    second = recipe(tmp_path, "train: {lr: 0.25}\n", "second.yaml")
    config, *_ = parse(["--config", first, "--config", second])
    assert (config.train.epochs, config.train.lr) == (3, 0.25)


def test_a_recipe_that_nobody_named_is_named_where_it_is_used_for_other_data(tmp_path, capsys):
    default = tmp_path / "digits.yaml"
    default.write_text("data: {name: digits}\n")
    parse(["--data.name", "digits"], default_recipe=default)
    parse(["--data.name", "synthetic", "--config", str(default)], default_recipe=default)
    assert capsys.readouterr().err == ""
    parse(["--data.name", "synthetic"], default_recipe=default)
    assert (
        "no --config: what is not said is taken from digits.yaml, made for data.name digits" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "words, epochs",
    [
        ("", 3),
        ("--teacher.pretrained true --teacher.name resnet34.tv_in1k", 4),
        ("--teacher.name resnet34.tv_in1k --teacher.pretrained=True", 4),
        ("--teacher.pretrained true --train.epochs 5", 5),
        ("--teacher.pretrained true --teacher.pretrained false", 3),
        ("--run.name=--teacher.pretrained", 3),
    ],
)
def test_a_pretrained_teacher_has_a_recipe_of_its_own(words, epochs, tmp_path, capsys):
    default = Path(recipe(tmp_path, "train: {epochs: 3}\ndata: {name: digits}\n", "default.yaml"))
    text = "train: {epochs: 4}\ndata: {name: digits}\nteacher: {pretrained: true}\n"
    given = dict(default_recipe=default, pretrained_recipe=Path(recipe(tmp_path, text, "pretrained.yaml")))
    config = parse(words.split(), **given).config
    assert config.train.epochs == epochs and config.teacher.pretrained == (epochs > 3)
    named = parse(["--teacher", "{pretrained: true}"], **given).config  # a group
    assert named.train.epochs == 4
    parse(["--teacher.pretrained", "true", "--data.name", "synthetic"], **given)
    assert capsys.readouterr().err == ""  # the weights bring the size of the images
    own = parse(["--teacher.pretrained", "true", "--config", str(default)], **given).config
    assert own.train.epochs == 3


def test_numbers_below_the_least_normal_one_are_zero_in_a_script():
    least, seen = torch.finfo(torch.float32).tiny, []
    try:
        cli.run(lambda: seen.append(torch.full((64,), least) * 0.5))
    finally:
        torch.set_flush_denormal(False)
    assert not seen[0].any() and (torch.full((64,), least) * 0.5).all()


def test_a_mistake_beside_a_recipe_that_nobody_named_says_whose_the_rest_is(tmp_path, capsys):
    default = Path(recipe(tmp_path, "student: {init: calibrated}\n", "default.yaml"))
    with pytest.raises(SystemExit):
        parse(["--student.name", "sew_resnet18"], default_recipe=default)
    assert "(without --config what is not said is from default.yaml)" in capsys.readouterr().err


def test_the_default_recipe_serves_where_none_is_named(tmp_path):
    default = Path(recipe(tmp_path, "train: {epochs: 3}\n", "default.yaml"))
    named = recipe(tmp_path, "train: {lr: 0.5}\n", "named.yaml")
    assert parse([], default_recipe=default)[0].train.epochs == 3
    assert parse(["--train.lr=0.5"], default_recipe=default)[0].train.epochs == 3
    for argv in (["--config", named], [f"--config={named}"]):
        config = parse(argv, default_recipe=default)[0]
        assert config.train.epochs == DistillConfig().train.epochs and config.train.lr == 0.5


def test_the_dump_resolves_every_field_and_gives_the_same_configuration_back(tmp_path):
    argv = ["--teacher.kwargs", "{channels: [1, 2]}", "--train.clip=1", "--taps=[layer1]", "--resume"]
    config, resume, text, _ = parse(argv)
    assert resume is True
    dumped = yaml.safe_load(text)
    assert dumped == dataclasses.asdict(config)
    assert {key for key in LEAVES if key not in flatten(dumped)} == {"teacher.kwargs"}  # a dictionary of its own
    assert parse(["--config", recipe(tmp_path, text)])[0] == config


@pytest.mark.parametrize(
    ("argv", "texts"),
    [
        (["--train.epoch=3"], ["train.epoch", "train.epochs"]),
        (["--train.epoch", "3"], ["train.epoch", "train.epochs"]),
        (["--studnet.timesteps=3"], ["studnet.timesteps", "student.timesteps"]),
        (["--nothing=3"], ["nothing"]),
        (["--train.epochs=abc"], ["train.epochs", "int", "abc"]),
        (["--train.epochs=0"], [" train.epochs", "at least 1", "0"]),
        (["--teacher_train.epochs=0"], [" teacher_train.epochs", "at least 1"]),
        (["--student.neuron.threshold=-1"], ["student.neuron.threshold", "-1"]),
        (["--student.neuron.reset=harder"], ["student.neuron.reset", "soft", "hard", "harder"]),
        (["--student.init=random"], ["student.init", "teacher", "scratch", "random"]),
        (["--student.algorithm=ottt"], ["student.algorithm", "rate_m", "bptt", "ottt"]),
        (["--run.mixed_precision=int8"], ["run.mixed_precision", "bf16", "int8"]),
        (["--data.name=mnits"], ["data.name", "digits", "folder", "mnits"]),
        (["--data.hflip=2"], ["data.hflip", "[0, 1]", "2"]),
        (["--config=no_such_file.yaml"], ["no_such_file.yaml"]),
    ],
)
def test_a_mistake_on_the_command_line_is_named_with_what_is_allowed(argv, texts, capsys):
    message = refused(argv, capsys)
    for text in texts:
        assert text in message


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("train: {epoch: 3}", ["train.epoch", "train.epochs"]),
        ("trian: {epochs: 3}", ["trian", "train"]),
        ("student: {neuron: {leek: 0.5}}", ["leek", "student.neuron.leak"]),
        ("epochs: 3", ["epochs", "train.epochs"]),
        ("train: {epochs: three}", ["epochs", "int", "three"]),
        ("train: {clip: -1}", ["train.clip", "above 0", "-1"]),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_what_is_allowed(text, texts, tmp_path, capsys):
    message = refused(["--config", recipe(tmp_path, text + "\n")], capsys)
    for expected in texts:
        assert expected in message.replace(str(tmp_path), "")


@pytest.mark.parametrize(
    "option", ["--train.epoch=3", "--train.epochs=abc", "--student.init=random", "--train.epochs=0"]
)
def test_a_mistake_takes_one_line(option, capsys):
    assert refused([option], capsys).count("\n") == 1


def test_options_cannot_be_abbreviated(capsys):
    assert "--train.epo" in refused(["--train.epo=3"], capsys)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad value"),
        FileNotFoundError("no such file"),
        PermissionError("not yours"),
        UnsupportedOperationError("no rule"),
        NonFiniteLossError("no number"),
    ],
)
def test_a_users_mistake_ends_with_one_line_and_status_2(error, capsys, monkeypatch):
    monkeypatch.delenv("SPIKESWAP_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["somewhere/script.py"])

    def main():
        raise error

    with pytest.raises(SystemExit) as raised:
        cli.run(main)
    assert raised.value.code == 2
    assert capsys.readouterr().err == f"script.py: error: {error}\n"
    monkeypatch.setenv("SPIKESWAP_TRACEBACK", "1")
    with pytest.raises(type(error), match=str(error)):
        cli.run(main)


def test_our_own_mistakes_keep_their_traceback():
    def main():
        raise AssertionError("ours")

    with pytest.raises(AssertionError):
        cli.run(main)


@pytest.mark.parametrize(
    ("arguments", "timesteps", "thresholds"),
    [
        (["--timesteps", "1,2,4,8"], [1, 2, 4, 8], None),
        (["--timesteps=1,2"], [1, 2], None),
        (["--timesteps", "[1, 2]"], [1, 2], None),
        (["--timesteps", "4", "--exit_thresholds", "0.5,1e-1"], [4], [0.5, 0.1]),
        (["--timesteps", "1, 2", "--exit_thresholds", "[]"], [1, 2], []),
    ],
)
def test_lists_of_numbers_are_written_with_commas(arguments, timesteps, thresholds):
    config = cli.parse(EvaluationConfig, ["--model", "1,2", *arguments], resumable=False).config
    assert config.timesteps == timesteps and config.model == "1,2"
    assert config.exit_thresholds == (EvaluationConfig(model="x").exit_thresholds if thresholds is None else thresholds)


def test_lists_of_numbers_inside_of_groups_are_written_with_commas_too():
    arguments = ["--schedule.epochs", "1,2,3,4", "--schedule.name", "progressive", "--teacher.mean=0.5,0.25,0"]
    config = cli.parse(DistillConfig, arguments).config
    assert config.schedule.epochs == [1, 2, 3, 4] and config.teacher.mean == [0.5, 0.25, 0.0]


def test_a_list_with_what_is_no_number_is_one_line(capsys):
    with pytest.raises(SystemExit):
        cli.parse(EvaluationConfig, ["--model", "x", "--timesteps", "1,x"], resumable=False)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "timesteps" in error and "1,x" in error
