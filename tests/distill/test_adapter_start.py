"""Adapters that start at a regression: against numpy's least squares, and what the hybrids gain by it."""

import numpy as np
import pytest
import torch
from toy_runs import distil, tiny
from toy_teachers import images_of, student_of, teacher_of

from distill import HybridDistiller, InitConfig
from distill.adapter_start import start_adapters
from distill.tails import look
from models.network import probing


def distiller_of(adapter="conv1x1"):
    teacher = teacher_of("resnet18", torch.float64)
    student = student_of(teacher)
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias += 0.5  # every layer fires
    return HybridDistiller(teacher, student, images=images_of(torch.float64), adapter=adapter).train()


def flat(x):
    return x.movedim(1, -1).flatten(0, -2).numpy()


@pytest.mark.parametrize("resized", [False, True])
def test_the_adapter_is_the_regression_of_the_features_on_the_rates(resized):
    if resized:
        teacher = teacher_of("resnet18", torch.float64)
        given = dict(taps=["layer2"], student_taps={"layer2": "layer1"}, images=images_of(torch.float64))
        distiller = HybridDistiller(teacher, student_of(teacher), **given).train()
    else:
        distiller = distiller_of()
    batches = [images_of(torch.float64, 6)[:4], images_of(torch.float64, 6)[4:]]
    names = [tap.name for tap in distiller.taps]
    modes = [module.training for module in distiller.modules()]
    explained = start_adapters(distiller, names, batches)
    assert [module.training for module in distiller.modules()] == modes and list(explained) == names
    images = torch.cat(batches)
    _, features = look(distiller.teacher, distiller.taps, images, maps=True)
    with probing(distiller.student, distiller.student.timesteps):
        rates = distiller.rates(images, names)
    for tap, adapter in zip(distiller.taps, distiller.adapters, strict=True):
        rate, feature = rates[tap.name], features[tap.name].map
        if resized:
            rate = torch.nn.functional.interpolate(rate, feature.shape[2:], mode="bilinear", align_corners=False)
        r, a = flat(rate), flat(feature)
        centred = r - r.mean(0)
        ridge = 1e-3 * (centred**2).mean()
        # the ridge as further rows, that pull the weights to zero
        rows = np.vstack([centred, np.sqrt(ridge * len(r)) * np.eye(r.shape[1])])
        weight = np.linalg.lstsq(rows, np.vstack([a - a.mean(0), np.zeros((r.shape[1], a.shape[1]))]), rcond=None)[0]
        expected = centred @ weight + a.mean(0)
        with torch.no_grad():
            found = flat(adapter.eval()(rates[tap.name], feature.shape[2:]))
        np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=0, atol=1e-9 * np.abs(a).max())
        share = 1 - ((a - expected) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
        assert explained[tap.name] == pytest.approx(share, abs=1e-9) and 0 < share < 1


def test_an_adapter_of_3x3_starts_as_one_of_1x1_does():
    found = {}
    for form in ("conv1x1", "conv3x3"):
        distiller = distiller_of(form)
        explained = start_adapters(distiller, ["layer2"], [images_of(torch.float64, 4)])
        adapter = distiller.adapters[1].eval()
        rate = torch.rand(2, adapter.in_channels, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found[form] = (explained, adapter(rate, rate.shape[2:]))
    assert found["conv1x1"][0] == found["conv3x3"][0]
    torch.testing.assert_close(found["conv1x1"][1], found["conv3x3"][1], rtol=0, atol=1e-12)


def test_an_adapter_without_a_convolution_starts_at_the_regression_of_each_channel_on_its_own():
    distiller, images = distiller_of("norm"), images_of(torch.float64, 6)
    explained = start_adapters(distiller, ["layer2"], [images[:4], images[4:]])
    tap, adapter = distiller.taps[1], distiller.adapters[1].eval()
    feature = look(distiller.teacher, [tap], images, maps=True)[1]["layer2"].map
    with probing(distiller.student, distiller.student.timesteps):
        rate = distiller.rates(images, ["layer2"])["layer2"]
    r, a = flat(rate), flat(feature)
    ridge = 1e-3 * r.var(0).mean()
    slopes = [np.cov(r[:, c], a[:, c], bias=True)[0, 1] / (r[:, c].var() + ridge) for c in range(r.shape[1])]
    expected = (r - r.mean(0)) * np.array(slopes) + a.mean(0)
    with torch.no_grad():
        found = flat(adapter(rate, feature.shape[2:]))
    np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=0, atol=1e-9 * np.abs(a).max())
    share = 1 - ((a - expected) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
    assert explained["layer2"] == pytest.approx(share, abs=1e-9) and 0 < share < 1


def test_only_the_adapters_that_are_named_are_set():
    distiller = distiller_of()
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    start_adapters(distiller, ["layer2"], [images_of(torch.float64, 4)])
    moved = {name for name, value in distiller.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[0] for name in moved} == {"adapters.1.conv", "adapters.1.bn"}


@pytest.mark.parametrize("form", ["conv1x1", "conv3x3", "norm"])
def test_silent_channels_leave_finite_weights(form):
    distiller = distiller_of(form)
    with torch.no_grad():
        distiller.student.layer1[-1].bn2.weight.zero_()
        distiller.student.layer1[-1].bn2.bias.fill_(-10.0)
        distiller.student.layer1[0].bn2.bias.fill_(-10.0)
    start_adapters(distiller, ["layer1"], [images_of(torch.float64, 4)])
    assert all(value.isfinite().all() for value in distiller.adapters[0].state_dict().values())


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match="at least one image to start from"):
        start_adapters(distiller_of(), ["layer1"], [])


@pytest.mark.parametrize("schedule", ["joint", pytest.param("progressive", marks=pytest.mark.slow)])
def test_a_run_starts_its_adapters_there_and_goes_on_without(tmp_path, schedule, monkeypatch):
    from distill import hybrid_training

    calls = []

    def start(distiller, names, batches):
        calls.append((tuple(names), sum(map(len, batches := list(batches)))))
        return start_adapters(distiller, names, batches)

    monkeypatch.setattr(hybrid_training, "start_adapters", start)
    parts = dict(init=InitConfig(adapters="regression", calibration_images=32), schedule=dict(name=schedule))
    config = tiny(tmp_path / "r", **parts, train=dict(epochs=4, batch_size=32), eval_timesteps=[])
    summary = distil(config)
    taps = ("layer1", "layer2", "layer3")
    assert calls == ([(taps, 32)] if schedule == "joint" else [((tap,), 32) for tap in taps])
    again = distil(config, resume=True)
    assert again["hybrid_top1"] == summary["hybrid_top1"] and len(calls) == (1 if schedule == "joint" else 3)
