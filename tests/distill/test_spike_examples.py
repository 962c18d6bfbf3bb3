"""The spikes and predictions that are kept for the report, against a network that is stepped by hand."""

import base64
import io

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from spikingjelly.activation_based import functional
from torch.utils.data import default_collate
from toy_networks import whole_and_stepped

import models
from distill.data import Preprocessing, Splits
from distill.data.event_frames import stack_frames
from distill.meters import neuron_layers
from distill.spike_examples import picture, spike_examples, spread, spread_over_classes

T, CLASSES = 3, ("zero", "one", "two", "three", "four", "five")
GREY = Preprocessing(input_size=(1, 8, 8), mean=(0.3,), std=(0.4,), interpolation="bilinear", crop_pct=1.0)


class Images:
    """12 float64 images of six classes, in the place of an image set."""

    labels = np.array([3, 0, 1, 2, 4, 5] * 2)
    collate = staticmethod(default_collate)

    def __init__(self):
        self.images = torch.randn(12, 1, 8, 8, dtype=torch.float64)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


def network(**options):
    snn = models.create_snn("resnet18_cifar", num_classes=6, in_chans=1, width=8, timesteps=T, **options).double()
    snn.train()
    for module in snn.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    if options.get("algorithm") != "ottt":
        snn(torch.randn(16, 1, 8, 8, dtype=torch.float64))  # statistics with which neurons fire
    return snn.eval()


def found(snn, layers, data=None):
    images = data or Images()
    splits = Splits(images, images, CLASSES)
    return spike_examples(Accelerator(cpu=True), snn, layers, GREY, splits), images


def test_spikes_and_predictions_are_those_of_the_network_stepped_by_hand():
    snn = network()
    layers = list(neuron_layers(snn))
    result, data = found(snn, layers)
    names = [layer["name"] for layer in result["layers"]]
    assert names == [layers[0], layers[len(layers) // 2], layers[-1]] and result["timesteps"] == T
    indices = [image["index"] for image in result["images"]]
    assert [CLASSES[data.labels[i]] for i in indices] == [image["label"] for image in result["images"]]

    functional.set_step_mode(snn, "s")
    spikes = {name: [] for name in names}
    hooks = [neuron_layers(snn)[n].register_forward_hook(lambda m, a, out, n=n: spikes[n].append(out)) for n in names]
    with torch.no_grad():
        logits = [snn(data.images[indices]) for _ in range(T)]
    for hook in hooks:
        hook.remove()
    for b, image in enumerate(result["images"]):
        for i, layer in enumerate(result["layers"]):
            flat = [step[b].flatten() for step in spikes[layer["name"]]]
            expected = [[t + 1 for t in range(T) if flat[t][n] == 1] for n in layer["neurons"]]
            assert image["spikes"][i] == expected
        for t in range(T):
            probabilities = (sum(step[b] for step in logits[: t + 1]) / (t + 1)).softmax(0)
            assert image["predictions"][t] == CLASSES[probabilities.argmax()]
            assert image["confidences"][t] == pytest.approx(probabilities.max().item(), abs=1e-4)
    for layer in result["layers"]:
        fires = torch.stack(spikes[layer["name"]]).flatten(2).amax((0, 1))
        assert layer["fired"] == int(fires.sum()) and 0 < len(layer["neurons"]) <= 24
        assert layer["neurons"] == sorted(set(layer["neurons"])) and fires[layer["neurons"]].all()
        assert layer["shape"] == list(spikes[layer["name"]][0].shape[1:])
    functional.set_step_mode(snn, "m")
    functional.reset_net(snn)
    assert found(snn, layers, data)[0] == result  # the same each time


@pytest.mark.parametrize("toy", ["Residual", "SharedNeuron"])
def test_a_part_that_runs_a_step_at_a_time_shows_the_same_spikes(toy):
    torch.manual_seed(2)
    data = Images()
    data.images = torch.randn(12, 3, 8, 8, dtype=torch.float64)
    whole, stepped = whole_and_stepped(toy, T, data.images)
    result, _ = found(whole, list(neuron_layers(whole)), data)
    again, _ = found(stepped, list(neuron_layers(stepped)), data)
    for layer in again["layers"]:
        layer["name"] = layer["name"].removeprefix("inner.")
    assert again == result and any(image["spikes"][0][0] for image in result["images"])


def test_spikes_of_dsr_count_though_they_are_as_large_as_their_threshold():
    snn = network(algorithm="dsr")
    layers = list(neuron_layers(snn))
    seen = []
    handle = neuron_layers(snn)[layers[0]].register_forward_hook(lambda m, a, out: seen.append(out.stream.flatten(2)))
    result, _ = found(snn, layers)
    handle.remove()
    assert 0 < seen[0].max() != 1
    first = result["layers"][0]
    expected = [t + 1 for t in range(T) if seen[0][t, 0, first["neurons"][0]] > 0]
    assert result["images"][0]["spikes"][0][0] == expected
    assert any(len(steps) for image in result["images"] for steps in image["spikes"][0])


def test_a_silent_layer_has_no_neurons_to_show():
    snn = network()
    for module in snn.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    result, _ = found(snn, list(neuron_layers(snn)))
    assert all(layer["neurons"] == [] and layer["fired"] == 0 for layer in result["layers"])
    assert result["images"][0]["spikes"] == [[], [], []]


def test_images_are_the_first_of_classes_that_are_spread_over_all():
    assert spread_over_classes(np.array([9, 7, 7, 5, 3, 1, 0, 9])) == [6, 4, 3, 0]  # of 0 1 3 5 7 9: 0, 3, 5 and 9
    assert spread_over_classes(np.array([1, 1, 0])) == [2, 0]
    assert spread(3, 4) == [0, 1, 2] and spread(10, 4) == [0, 3, 6, 9] and spread(0, 4) == []


def pixels(uri):
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_picture_has_the_pixels_before_normalisation():
    values = torch.randint(0, 256, (3, 5, 7))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    image = (values / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    pre = Preprocessing(input_size=(3, 5, 7), mean=mean, std=std, interpolation="bilinear", crop_pct=1.0)
    assert (pixels(picture(image, pre)) == values.permute(1, 2, 0).numpy()).all()
    grey = Preprocessing(input_size=(1, 5, 7), mean=(0.5,), std=(2.0,), interpolation="bilinear", crop_pct=1.0)
    assert (pixels(picture((values[:1] / 255 - 0.5) / 2, grey)) == values[0].numpy()).all()
    assert max(pixels(picture(torch.rand(1, 300, 200), grey)).shape) == 96  # larger ones are made smaller


def test_a_picture_of_event_frames_is_the_sum_of_both_polarities_over_time():
    counts = torch.tensor([[[[0.0, 1.0]], [[0.0, 2.0]]], [[[1.0, 0.0]], [[0.0, 1.0]]]])  # (T, C, 1, 2)
    mean, std = (0.5, 0.25), (2.0, 4.0)
    scaled = [torch.tensor(v).view(2, 1, 1) for v in (mean, std)]
    frames = (counts - scaled[0] / 2) / scaled[1]  # as `distill.data.event_frames` makes them
    pre = Preprocessing(input_size=(2, 1, 2), mean=mean, std=std, interpolation="bilinear", crop_pct=1.0)
    assert pixels(picture(frames, pre)).tolist() == [[64, 255]]  # 1 and 4 events
    stacked, _ = stack_frames([(frames, 0), (frames, 1)])
    assert torch.equal(stacked[:, 1], frames)  # as the recording finds one recording in a batch
