"""Accuracy of networks that always answer the same."""

import pytest
import torch
from accelerate import Accelerator
from host_reads import HostReads
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_teachers import snn_of

from distill import HybridOutput
from distill.evaluation import at_timesteps, by_name, top1

LABELS = [0, 1, 2, 2, 2, 0, 1]  # seven images, in batches of 3, 3 and 1


@pytest.fixture
def prepared():
    accelerator = Accelerator(cpu=True)
    images = torch.arange(7.0).reshape(7, 1, 1, 1).expand(7, 2, 4, 4).contiguous()
    loader = DataLoader(TensorDataset(images, torch.tensor(LABELS)), 3)
    return accelerator, accelerator.prepare(loader)


def always(answer):
    return lambda images: nn.functional.one_hot(torch.full((len(images),), answer), 3).float()


def test_top1_is_the_percentage_over_all_images_of_each_network(prepared):
    networks = {f"answers {answer}": always(answer) for answer in range(3)}
    networks["right"] = lambda images: torch.eye(3)[torch.tensor(LABELS)[images[:, 0, 0, 0].long()]]
    found = top1(*prepared, lambda images: {name: network(images) for name, network in networks.items()})
    assert found == pytest.approx({"answers 0": 200 / 7, "answers 1": 200 / 7, "answers 2": 300 / 7, "right": 100.0})


def test_batches_are_counted_without_waiting_for_them(prepared, monkeypatch):
    accelerator, loader = prepared
    batches = list(loader)  # loaders read their own numbers, on the host
    monkeypatch.setattr(torch.Tensor, "cpu", None, raising=False)  # a copy waits, too
    with HostReads() as reads:
        found = top1(accelerator, batches, lambda images: {"answers 2": torch.eye(3)[2].expand(len(images), 3)})
    assert reads.count == 0 and found == pytest.approx({"answers 2": 300 / 7})


def test_the_summary_names_each_network():
    teacher, student, hybrid = (torch.full((1, 2), float(i)) for i in range(3))
    found = by_name(HybridOutput(student, teacher, {"layer1": hybrid}))
    assert list(found) == ["teacher_top1", "hybrid_top1/layer1", "student_top1"]
    assert [value[0, 0].item() for value in found.values()] == [0.0, 2.0, 1.0]


def test_evaluation_at_other_time_steps_puts_the_networks_own_back(prepared):
    snn = snn_of(threshold=2.0, timesteps=3)
    with torch.no_grad():  # class 1 with one step, when nothing has fired yet; class 2 from two on
        snn[4].weight.copy_(torch.tensor([[0.0] * 3, [0.0] * 3, [10.0] * 3]))
        snn[4].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    found = {}
    for steps in (1, 2, 4):
        with at_timesteps(snn, steps):
            found[steps] = top1(*prepared, lambda images: {"student": snn(images)})["student"]
        assert snn.timesteps == 3
    assert found == pytest.approx({1: 200 / 7, 2: 300 / 7, 4: 300 / 7})
    with pytest.raises(RuntimeError, match="in the pass"), at_timesteps(snn, 1):
        raise RuntimeError("in the pass")
    assert snn.timesteps == 3
    with pytest.raises(ValueError, match="timesteps"), at_timesteps(snn, 0):
        pass
    assert snn.timesteps == 3
