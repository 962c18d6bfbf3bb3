"""Learning rates over a training, and optimizers by name."""

import pytest
from torch import nn
from toy_training import HALF_COSINE, config_of, linear

from distill.optimizers import make_optimizer, warmup_cosine


def test_the_learning_rate_rises_linearly_and_falls_along_half_a_cosine():
    factor = warmup_cosine(config_of(warmup_steps=3), steps=7)
    assert [factor(step) for step in range(8)] == pytest.approx([1 / 4, 2 / 4, 3 / 4, *HALF_COSINE], abs=1e-12)
    assert factor(9) == pytest.approx(0.0, abs=1e-12)


def test_the_cosine_ends_at_the_smallest_learning_rate():
    factor = warmup_cosine(config_of(lr=0.4, min_lr=0.1), steps=4)
    expected = [0.1 + 0.3 * share for share in HALF_COSINE]
    assert [0.4 * factor(step) for step in range(5)] == pytest.approx(expected, abs=1e-12)


def test_a_warm_up_longer_than_the_training_only_rises():
    factor = warmup_cosine(config_of(warmup_steps=100), steps=3)
    assert [factor(step) for step in range(3)] == pytest.approx([1 / 4, 2 / 4, 3 / 4])


def test_weight_decay_leaves_biases_and_norms_alone():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    optimizer = make_optimizer(network, config_of(weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(network[0].weight)] == 0.5
    assert [decay[id(p)] for p in (network[0].bias, network[1].weight, network[1].bias)] == [0.0] * 3


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb"])
def test_timm_optimizers_are_made_by_name(name):
    optimizer = make_optimizer(linear(), config_of(optimizer=name, lr=0.25, momentum=0.75))
    assert optimizer.param_groups[0]["lr"] == 0.25
    if name in ("sgd", "momentum"):
        assert optimizer.param_groups[0]["momentum"] == 0.75
        assert optimizer.param_groups[0]["nesterov"] == (name == "sgd")


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"optimizer: timm knows no 'sgdd'"):
        make_optimizer(linear(), config_of(optimizer="sgdd"))


def test_sgd_without_momentum_is_either_made_or_refused_for_what_it_is():
    try:
        optimizer = make_optimizer(linear(), config_of(optimizer="sgd", momentum=0.0))
    except ValueError as error:
        assert "momentum" in str(error) and "knows no optimizer" not in str(error)
    else:
        assert optimizer.param_groups[0]["momentum"] == 0.0
