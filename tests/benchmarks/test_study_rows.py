"""What the rows of the study run."""

import dataclasses
import itertools

import pytest
from toy_study import config_of

from benchmarks.study import ablations
from benchmarks.study.ablations import ABLATION_ROWS, ABLATIONS, ALL_ROWS
from benchmarks.study.rows import BEST, HYBRIDS, ROWS, changed
from benchmarks.study.running import command
from distill.schedules import stages_of


@pytest.mark.parametrize(
    "name, scale",
    [(name, "short") for name in ALL_ROWS]
    + [(name, scale) for name in ROWS for scale in ("full", "medium", "wide", "wide_60")]
    + [(name, "full") for name in ABLATION_ROWS if ABLATIONS[name.split("-")[1]].scales == ("full",)],
)
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
    channels = [64, 128, 256, 512] if scale.startswith("wide") else [32, 64, 128, 256]
    assert ann.kwargs == {"channels": channels} and config.run.seed == 3 and config.run.threads == 1
    epochs = {"short": 3, "medium": 2, "full": 6, "wide": 30, "wide_60": 60}[scale]
    images = 10240 if scale == "short" else None
    assert config.train.epochs == epochs and config.data.max_train_samples == images and config.data.hflip == 0.5
    if row.script == "distill" and isinstance(config.taps, list):
        assert sum(stage.epochs for stage in stages_of(config.schedule, config.taps, epochs)) == epochs


@pytest.mark.parametrize("name", ["scratch", "bptt", "tet", "ann", "joint_sew"])
def test_fresh_weights_take_large_steps_and_learn_their_statistics(name, place):
    config = config_of(name, place)
    assert config.train.lr == 0.03 and not config.train.freeze_norms
    assert config_of(name, dataclasses.replace(place, scale="full")).train.lr == 0.1
    wide = config_of(name, dataclasses.replace(place, scale="wide"))
    assert wide.train.lr == 0.2 and (name != "joint_sew" or (config.student.width, wide.student.width) == (32, 64))


@pytest.mark.parametrize("name", ["teacher_weights", "kd", *HYBRIDS, f"{BEST}_t8"])
def test_twins_start_calibrated_and_take_small_steps(name, place):
    config = config_of(name, place)
    assert config.student.init == "calibrated" and config.train.freeze_norms
    assert config.train.lr == (0.001 if name == "teacher_weights" else 0.002)
    assert config.student.neuron.leak == 0.5 and not config.student.neuron.detach_reset
    assert name in ("teacher_weights", "kd") or config.init.adapters == "regression"


@pytest.mark.parametrize("scale", ["full", "long", "wide", "wide_60"])
@pytest.mark.parametrize("name", ["teacher_weights", "kd", *HYBRIDS, f"{BEST}_t8"])
def test_long_trainings_take_larger_steps_with_the_statistics_of_the_batch_and_labels(name, scale, place):
    config = config_of(name, dataclasses.replace(place, scale=scale))
    assert config.student.init == "calibrated" and not config.train.freeze_norms
    assert config.train.lr == {128: 0.02, 256: 0.04}[config.train.batch_size]
    assert name == "teacher_weights" or (config.loss.student_ce == 1 and config.loss.temperature == 4)
    assert name in ("teacher_weights", "kd") or config.loss.hybrid_ce == 1
    assert ROWS["joint"].said("short")["loss.student_ce"] == ROWS["joint"].said("short")["loss.hybrid_ce"] == "0"


def test_the_remedies_lead_from_the_first_setting_to_the_default():
    names = ablations.ABLATIONS["remedies"].rows("remedies")
    changed = [
        {key for key, value in ALL_ROWS[name].arguments.items() if ROWS["joint"].arguments.get(key) != value}
        for name in names
    ]
    assert changed[0] == {*ablations._FIRST} and changed[-1] == {*ablations.WITH_LABELS, "train.lr"}
    assert all(later < earlier for earlier, later in itertools.pairwise(changed[:2] + changed[3:]))
    assert not any("remedies" in name for name in ablations.ablation_rows("full"))
    assert not any("kd_steps" in name for name in ablations.ablation_rows("short"))
    assert {*ablations.ablation_rows("short"), *ablations.ablation_rows("full")} == ABLATION_ROWS.keys()


def test_rows_derived_from_the_best_differ_in_what_they_say():
    assert ROWS[f"{BEST}_t8"].arguments == ROWS[BEST].arguments | {"student.timesteps": "8"}
    assert [row.seeds for row in (ROWS[f"{BEST}_t8"], ROWS["kd"], ROWS["bptt"])] == [1, 3, 1]
    blocks = changed(ROWS["progressive"], "", "", {"taps": "blocks"})
    assert blocks.arguments["taps"] == "blocks" and "taps" not in blocks.at_scale["short"]
    assert blocks.at_scale["short"]["schedule.epochs"] == "[1, 2]"
    assert ABLATION_ROWS["scratch-gradient_scale-1_over_T"].script == "train_snn"
    for group, ablation in ABLATIONS.items():
        assert list(ablation.rows(group).values()) == list(ablation.changes)
