"""What is said when a student is made."""

import logging

import pytest
import torch

from distill.data import Preprocessing, Splits
from distill.network_config import StudentConfig
from distill.students import make_student, probe_images, sample_images
from models import NeuronConfig

SIZE = (3, 32, 32)


def warnings_of(caplog, algorithm="rate_m", timesteps=4, say=True, **neuron):
    config = StudentConfig(
        name="resnet18_cifar", width=4, algorithm=algorithm, timesteps=timesteps, neuron=NeuronConfig(**neuron)
    )
    caplog.clear()
    pre = Preprocessing(input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    with caplog.at_level(logging.WARNING):
        make_student(config, None, 10, torch.zeros(1, *SIZE), pre, say=say)
    return [record.message for record in caplog.records]


def test_a_rate_rule_whose_gradient_grows_from_layer_to_layer_is_said(caplog):
    # e_t = 1, 2, 3, 4; of a leak of 0.8 1, 1.8, 2.44, 2.952; of one of 0.5 1, 1.5, 1.75, 1.875
    for leak, gain in ((1.0, "2.5"), (0.8, "2.0"), (0.5, "1.5")):
        (said,) = warnings_of(caplog, leak=leak)
        assert f"with leak {leak:g} " in said and f"by up to {gain} in each layer of T = 4" in said
    (said,) = warnings_of(caplog, "rate_s", leak=1.0, timesteps=8)
    assert "rate_s lets them grow by up to 4.5" in said


@pytest.mark.parametrize(
    "harmless",
    [
        {"leak": 0.2},
        {"leak": 0.3, "timesteps": 64},
        {"leak": 1.0, "timesteps": 2},  # 1.5
        {"leak": 0.8, "alpha": 2.0},
        {"leak": 1.0, "detach_reset": False},
        {"leak": 1.0, "reset": "hard"},
        {"leak": 1.0, "algorithm": "bptt"},
        {"leak": 1.0, "say": False},
    ],
)
def test_other_gradients_need_no_warning(caplog, harmless):
    assert warnings_of(caplog, **harmless) == []


def test_images_are_sampled_as_a_student_sees_them_and_summed_for_a_teacher():
    frames = torch.arange(20 * 3 * 2, dtype=torch.float64).view(20, 3, 2, 1, 1)  # 20 recordings of 3 frames
    data = Splits([], [(recording, 0) for recording in frames], ("a",))
    found = sample_images(data, torch.device("cpu"))
    assert torch.equal(found, frames[[0, 2, 5, 7, 10, 12, 15, 17]].transpose(0, 1))
    assert torch.equal(probe_images(data, torch.device("cpu")), found.sum(0))
