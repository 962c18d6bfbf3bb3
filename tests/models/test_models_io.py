"""Networks to a folder and back; each way in which that can fail, by its message."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import (
    DSRConfig,
    NeuronConfig,
    PoissonEncoder,
    create_ann,
    create_snn,
    load_snn,
    load_weights,
    save_snn,
    set_algorithm,
    spiking_twin,
)

NARROW = {"channels": [8, 16, 16, 16]}
SIZE = (3, 32, 32)


def used(snn):
    """As after some training: other weights, statistics, steps and algorithm than a fresh network has."""
    torch.manual_seed(5)
    for module in snn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(12)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    snn.timesteps = 3
    snn.algorithm = "bptt"
    return snn.eval()


NEURON = NeuronConfig(leak=0.5, threshold=0.7, reset="hard", detach_reset=False, alpha=2.0)
NETWORKS = {
    "by name": lambda: create_snn("resnet18_cifar", num_classes=7, neuron=NEURON),
    "twin": lambda: spiking_twin(
        create_ann("resnet18", num_classes=7, cifar_stem=True, kwargs=NARROW), neuron=NEURON, input_size=SIZE
    ),
    "twin of grey images": lambda: spiking_twin(
        create_ann("resnet18", num_classes=7, in_chans=1, kwargs=NARROW), neuron=NEURON, input_size=(1, 32, 32)
    ),
    "twin of a timm network": lambda: spiking_twin(
        timm.create_model("mobilenetv2_035", num_classes=7, in_chans=3), neuron=NEURON, input_size=SIZE
    ),
    "twin with gates": lambda: spiking_twin(
        create_ann("mobilenetv3_small_050", num_classes=7), neuron=NEURON, gates="keep", input_size=SIZE
    ),
}

OTHERS = {
    "narrow": lambda: create_snn("resnet18_cifar", num_classes=7, width=8, algorithm="rate_s"),
    "learned leak": lambda: create_snn(
        "resnet18_cifar", width=8, neuron=NeuronConfig(leak=0.5, learnable_leak=True, reset="hard")
    ),
    "twin with learned leaks": lambda: spiking_twin(
        create_ann("resnet18", num_classes=7, cifar_stem=True, kwargs=NARROW),
        neuron=NeuronConfig(leak=0.5, learnable_leak=True),
        algorithm="rate_s",
        input_size=SIZE,
    ),
    "encoder": lambda: create_snn("resnet18_cifar", width=8, encoder=PoissonEncoder(mean=(0.5, 0.4, 0.3), std=(0.2,))),
    "twin with an encoder": lambda: spiking_twin(
        create_ann("resnet18", num_classes=7, cifar_stem=True, kwargs=NARROW),
        input_size=SIZE,
        encoder=PoissonEncoder(mean=(0.5,), std=(0.25,)),
    ),
    "ottt": lambda: create_snn("resnet18_cifar", width=8, algorithm="ottt"),
    "sltt": lambda: create_snn("resnet18_cifar", width=8, algorithm="sltt"),
    "dsr": lambda: create_snn("resnet18_cifar", width=8, algorithm="dsr"),
    "dsr of leaky neurons": lambda: create_snn(
        "resnet18_cifar",
        width=8,
        algorithm="dsr",
        dsr=DSRConfig(model="lif", threshold=0.7, alpha=0.4, grad_scaling=0.1, tau=1.5, delta_t=0.1, lower_bound=0.2),
    ),
    "dsr of constant thresholds": lambda: create_snn(
        "resnet18_cifar", width=8, algorithm="dsr", dsr=DSRConfig(threshold=2.0, learn_threshold=False)
    ),
}


@pytest.mark.parametrize("network", OTHERS)
def test_other_neurons_and_inputs_come_back(network, tmp_path):
    """Parameters and statistics moved as in training, and the network ran before it was saved."""
    snn = OTHERS[network]()
    algorithm = snn.algorithm
    used(snn).timesteps = 3
    snn.algorithm = algorithm
    images = torch.rand(2, 3, 32, 32) * 0.4
    with torch.no_grad():
        for parameter in snn.parameters():
            parameter.mul_(1.25)
    seen = snn.train()(images, step=0) if algorithm in ("ottt", "sltt") else snn.train()(images)
    seen.square().sum().backward()
    torch.manual_seed(3)
    logits = snn.eval()(images)
    save_snn(snn, tmp_path)
    loaded = load_snn(tmp_path)
    torch.manual_seed(3)
    assert logits.std() > 0 and torch.equal(loaded(images), logits)
    assert loaded.algorithm == algorithm and loaded.input_encoder == snn.input_encoder
    assert loaded.spec == {**snn.spec, "timesteps": 3}
    assert all(torch.equal(v, snn.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert loaded.state_dict().keys() == snn.state_dict().keys()


def test_an_algorithm_chosen_later_comes_back(tmp_path):
    snn = set_algorithm(create_snn("resnet18_cifar", width=4), "sltt")
    save_snn(snn, tmp_path)
    loaded = load_snn(tmp_path)
    assert loaded.algorithm == "sltt"
    assert loaded.train()(torch.randn(2, *SIZE), step=0).requires_grad


def small_twin():
    return used(NETWORKS["twin"]())


@pytest.mark.parametrize("network", NETWORKS)
def test_a_loaded_network_has_the_saved_ones_logits(network, tmp_path):
    snn = used(NETWORKS[network]())
    save_snn(snn, tmp_path / "new" / "folder")
    loaded = load_snn(tmp_path / "new" / "folder")
    images = torch.randn(2, snn.in_chans, 32, 32)
    logits = snn(images)
    assert logits.std() > 0 and torch.equal(loaded(images), logits)
    assert (loaded.timesteps, loaded.algorithm, loaded.in_chans) == (3, "bptt", snn.in_chans)
    assert not loaded.training and type(loaded) is type(snn)
    assert loaded.state_dict().keys() == snn.state_dict().keys()
    assert all(torch.equal(v, snn.state_dict()[k]) for k, v in loaded.state_dict().items())
    save_snn(loaded, tmp_path / "again")
    assert torch.equal(load_snn(tmp_path / "again")(images), logits)


def test_a_loaded_network_trains_on(tmp_path):
    snn = NETWORKS["twin"]()
    save_snn(snn, tmp_path)
    loaded = load_snn(tmp_path).train()
    loaded(torch.randn(2, *SIZE)).square().sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_saving_changes_neither_the_network_nor_the_random_numbers(tmp_path):
    snn = small_twin().train()
    before = {k: v.clone() for k, v in snn.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    save_snn(snn, tmp_path)
    assert torch.equal(torch.rand(4), wanted)
    assert snn.training and all(torch.equal(before[k], v) for k, v in snn.state_dict().items())


def test_the_folder_holds_two_plain_files(tmp_path):
    snn = small_twin().to(memory_format=torch.channels_last)
    save_snn(snn, tmp_path, extra={"classes": ["cat", "dog"]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    spec = json.loads((tmp_path / "config.json").read_text())
    assert spec["kind"] == "twin" and spec["neuron"]["reset"] == "hard" and spec["extra"] == {"classes": ["cat", "dog"]}
    assert spec["ann"]["kwargs"] == NARROW
    assert load_file(tmp_path / "model.safetensors").keys() == snn.state_dict().keys()
    assert load_snn(tmp_path).spec["extra"] == {"classes": ["cat", "dog"]}


def test_saving_twice_replaces(tmp_path):
    snn = small_twin()
    save_snn(snn, tmp_path, extra={"epoch": 1})
    with torch.no_grad():
        snn.fc.bias.add_(1)
    snn.timesteps = 2
    save_snn(snn, tmp_path)
    loaded = load_snn(tmp_path)
    assert torch.equal(loaded.fc.bias, snn.fc.bias) and loaded.timesteps == 2 and "extra" not in loaded.spec


# -- networks that cannot be rebuilt ------------------------------------------------------------------


def test_a_network_with_another_head_is_refused(tmp_path):
    snn = small_twin()
    snn.fc = nn.Linear(16, 9)
    with pytest.raises(ValueError, match=r"changed by hand.*'fc.*models.create_ann"):
        save_snn(snn, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_network_with_another_module_is_refused(tmp_path):
    snn = small_twin()
    snn.extra_layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"changed by hand.*extra_layer"):
        save_snn(snn, tmp_path)


def test_the_arguments_that_timm_remembers_are_enough_to_rebuild(tmp_path):
    ann = timm.create_model("resnet18", num_classes=7, **NARROW)
    if not hasattr(ann, "_model_args"):
        pytest.skip("this version of timm does not remember its arguments")
    snn = spiking_twin(ann, input_size=SIZE).eval()
    save_snn(snn, tmp_path)
    images = torch.randn(2, *SIZE)
    torch.testing.assert_close(load_snn(tmp_path)(images), snn(images), rtol=0, atol=0)


def test_arguments_that_no_file_holds_are_refused_before_anything_is_written(tmp_path):
    snn = spiking_twin(create_ann("resnet18", 7, kwargs=NARROW | {"act_layer": nn.ReLU6}), input_size=SIZE)
    with pytest.raises(ValueError, match="cannot be written to a file"):
        save_snn(snn, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_extra_of_other_types_than_jsons_is_refused_before_anything_is_written(tmp_path):
    snn = small_twin()
    with pytest.raises(ValueError, match=r"extra takes JSON types: .*float32"):
        save_snn(snn, tmp_path / "new", {"mean": [np.float32(0.3)]})
    assert not (tmp_path / "new").exists()
    save_snn(snn, tmp_path / "there", {"mean": [0.3]})
    before = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    with torch.no_grad():
        snn.fc.bias.add_(1)
    with pytest.raises(ValueError, match="extra takes JSON types"):
        save_snn(snn, tmp_path / "there", {"mean": [np.float32(0.3)]})
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == before


@pytest.mark.parametrize("change", ["timm's stride", "max pool", "one neuron"])
def test_a_change_that_no_weight_shows_is_not_lost(change, tmp_path):
    """Keys and shapes are the same, the logits are not: saving must refuse or loading must give the same network."""
    if change == "timm's stride":
        snn = spiking_twin(timm.create_model("resnet18", num_classes=7, output_stride=8), input_size=SIZE)
    elif change == "max pool":
        ann = timm.create_model("resnet18", num_classes=7)
        ann.maxpool = nn.Identity()
        snn = spiking_twin(ann, input_size=SIZE)
    else:
        snn = NETWORKS["by name"]()
        snn.layer1[0].spike1.config = NeuronConfig(leak=1.0, threshold=0.1)
    snn = used(snn)
    images = torch.randn(2, *SIZE)
    try:
        save_snn(snn, tmp_path)
    except ValueError:
        return
    assert torch.equal(load_snn(tmp_path)(images), snn(images))


def test_a_twin_of_no_timm_network_is_refused(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    with pytest.raises(ValueError, match="was not made by timm: how to rebuild it is not known"):
        save_snn(spiking_twin(network, input_size=SIZE), tmp_path)


# -- folders that cannot be loaded --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_snn(small_twin(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no saved spiking network: {name} is missing"):
        load_snn(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere holds no saved spiking network"):
        load_snn(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere"):
        load_weights(nn.Linear(2, 2), tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text", ["{", "", "[]", "{}", '"twin"', '{"kind": "twin", "neuron": {}}', '{"kind": "twin", "neuron": 3}'], ids=repr
)
def test_a_broken_configuration_is_named(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json does not describe a spiking network"):
        load_snn(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "analogue"}, "kind must be one of 'network', 'twin', found 'analogue'"),
        ({"timesteps": 0}, "timesteps must be an integer of at least 1, found 0"),
        ({"algorithm": "bp"}, "algorithm must be one of"),
        ({"algorithm": "ottt"}, "ottt trains the networks of .*a twin takes one of .'rate_m', 'rate_s', 'bptt'"),
        ({"algorithm": "dsr"}, "dsr trains the networks of .*a twin takes one of"),
        ({"encoder": {"mean": [0.5], "std": [0.0]}}, "std must be above 0"),
        ({"encoder": {"means": [0.5]}}, "does not describe a spiking network: .*means"),
        ({"neuron": {"leak": 1.0, "learnable_leak": True}}, "leak must be below 1 where it is learned"),
        ({"neuron": {"leak": 7}}, "leak must be in"),
        ({"neuron": {"wings": 7}}, "does not describe a spiking network: .*wings"),
        ({"ann": {"name": "resnet81"}}, "timm knows no network 'resnet81'"),
        ({"ann": None}, "does not describe a spiking network"),
    ],
    ids=str,
)
def test_a_configuration_with_other_values_is_refused(change, message, folder):
    spec = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**spec, **change}))
    with pytest.raises(ValueError, match=message):
        load_snn(folder)


def test_other_keys_and_shapes_are_named(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["fc.wait"] = state.pop("fc.weight")
    state["fc.bias"] = torch.zeros(3)
    save_file(state, path)
    message = (
        r"1 missing keys \['fc.weight'\], 1 unknown keys \['fc.wait'\], "
        r"1 other shapes \['fc.bias: \(3,\), wanted \(7,\)'\]"
    )
    with pytest.raises(ValueError, match=message):
        load_snn(folder)


def test_weights_that_do_not_fit_change_nothing(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["fc.bias"] = torch.zeros(3)
    save_file(state, path)
    network = NETWORKS["twin"]()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit SpikingResNet"):
        load_weights(network, path)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"not weights", None], ids=["empty", "text", "cut"])
def test_a_broken_weights_file_is_named(content, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        load_snn(folder)


def test_weights_keep_the_networks_type_and_memory_format(tmp_path):
    source, target = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3).double().to(memory_format=torch.channels_last)
    save_file(source.state_dict(), tmp_path / "conv.safetensors")
    load_weights(target, tmp_path / "conv.safetensors")
    assert target.weight.dtype == torch.float64
    assert target.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(target.weight.float(), source.weight)


def test_an_encoder_that_was_set_later_is_saved(tmp_path):
    snn = create_snn("resnet18_cifar", width=4)
    snn.input_encoder = PoissonEncoder(mean=(0.5,), std=(0.25,))
    save_snn(snn, tmp_path)
    assert load_snn(tmp_path).input_encoder == snn.input_encoder
