"""Networks on the hub and back, without one: its two ends are replaced, and what comes back is compared in numbers."""

import copy
import json
import pickle
import re
import shutil
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelHubMixin
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from toy_networks import Residual, spiking

from models import NeuronConfig, SpikingNetwork, create_ann, create_snn, load_snn, spiking_twin
from models.card import CITATIONS
from models.hub import local_folder
from models.network import as_spiking

EXTRA = {"input_size": [3, 16, 16], "mean": [0.5], "std": [0.5], "classes": ["a", "b", "c"]}


def twin():
    ann = create_ann("resnet18", num_classes=3, cifar_stem=True, kwargs={"channels": [8, 8, 8, 8]})
    snn = spiking_twin(ann, timesteps=3, input_size=(3, 16, 16)).eval()
    snn.spec["extra"] = EXTRA
    return snn


class Hub:
    """Folders by id, in place of the hub; remembers what it was asked."""

    def __init__(self, root):
        self.root, self.asked = root, []

    def snapshot_download(self, repo_id, *, allow_patterns, **asked):
        self.asked.append(asked | {"allow_patterns": allow_patterns})
        if not (self.root / repo_id).is_dir():
            raise LocalEntryNotFoundError(f"no such\nrepository: {repo_id}")
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


# -- folders ------------------------------------------------------------------------------------------


def test_a_folder_holds_weights_configuration_and_card_and_gives_the_network_back(tmp_path):
    snn, images = twin(), torch.rand(4, 3, 16, 16)
    assert snn.save_pretrained(tmp_path / "there") is None
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert load_file(tmp_path / "there" / "model.safetensors").keys() == snn.state_dict().keys()
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert config["ann"]["name"] == "resnet18" and config["extra"] == EXTRA and config["timesteps"] == 3
    for load in (load_snn, SpikingNetwork.from_pretrained, type(snn).from_pretrained):
        loaded = load(tmp_path / "there")
        assert torch.equal(loaded(images), snn(images)) and not loaded.training
        assert type(loaded) is type(snn) and loaded.spec["extra"] == EXTRA


def test_the_card_says_what_the_network_is_how_it_is_used_and_whom_to_cite(tmp_path):
    twin().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "spikeswap" and card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-classification" and "spiking-neural-network" in card.data.tags
    for text in ("# Spiking twin of resnet18", "3 time steps", 'models.load_snn("', "snn.predict(", "Apache-2.0"):
        assert text in card.text
    assert f"```bibtex\n{CITATIONS}\n```" in card.text
    assert "2503.16572" in CITATIONS and "2410.11488" in CITATIONS and CITATIONS.count("@inproceedings{") == 2


def test_the_card_of_event_frames_speaks_of_no_image_files(tmp_path):
    create_snn("vggsnn_dvs", in_chans=2, width=8).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "(T, B, C, H, W)" in text and "predict" not in text


def test_a_card_comes_along(tmp_path):
    """What a run wrote of accuracies and recipe is not lost when its network moves on."""
    twin().save_pretrained(tmp_path / "run")
    written = (tmp_path / "run" / "README.md").read_text().replace("3 time steps", "98.76 % top-1")
    (tmp_path / "run" / "README.md").write_text(written)
    load_snn(tmp_path / "run").save_pretrained(tmp_path / "copy")
    first, second = (ModelCard.load(tmp_path / name / "README.md") for name in ("run", "copy"))
    assert "98.76 % top-1" in second.text and first.text == second.text and first.data.tags == second.data.tags


def test_a_card_of_another_number_of_time_steps_says_so(tmp_path):
    twin().save_pretrained(tmp_path / "run")
    snn = load_snn(tmp_path / "run")
    assert "Saved with" not in str(snn.generate_model_card())
    snn.timesteps = 5
    snn.save_pretrained(tmp_path / "copy")
    text = ModelCard.load(tmp_path / "copy" / "README.md").text
    assert "Saved with 5 time steps; what follows was measured with 3." in text and "# Spiking twin" in text


def test_the_card_of_a_second_change_names_the_time_steps_of_the_figures(tmp_path):
    twin().save_pretrained(tmp_path / "3")
    first = ModelCard.load(tmp_path / "3" / "README.md")
    for before, steps in ((3, 5), (5, 7), (7, 7), (7, 3)):
        snn = load_snn(tmp_path / str(before))
        snn.timesteps = steps
        shutil.rmtree(tmp_path / str(steps), ignore_errors=True)
        snn.save_pretrained(tmp_path / str(steps))
        card = ModelCard.load(tmp_path / str(steps) / "README.md")
        notes = re.findall("Saved with .* measured with .*", card.text)
        assert notes == ([] if steps == 3 else [f"Saved with {steps} time steps; what follows was measured with 3."])
        assert card.text.endswith(first.text.lstrip()) and card.data.tags == first.data.tags


def test_a_twin_that_could_not_be_rebuilt_is_not_saved(tmp_path):
    snn = twin()
    snn.fc = nn.Linear(8, 5)
    with pytest.raises(ValueError, match="changed by hand"):
        snn.save_pretrained(tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("reason", ["changed by hand", "no space left"])
def test_a_network_that_is_not_saved_leaves_the_one_that_lies_there(reason, tmp_path, monkeypatch):
    twin().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    snn = load_snn(tmp_path)
    if reason == "changed by hand":
        snn.fc = nn.Linear(8, 5)
    else:
        monkeypatch.setattr("models.io.save_file", Mock(side_effect=SafetensorError("no space left")))
    with pytest.raises((ValueError, OSError), match=reason):
        snn.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# -- the mixin ----------------------------------------------------------------------------------------


def test_spiking_networks_are_huggingface_hubs_and_nothing_more_than_before():
    snn = twin()
    assert isinstance(snn, ModelHubMixin)
    copied = copy.deepcopy(snn)
    assert vars(copied).keys() == vars(snn).keys()  # the mixin would leave the arguments of __init__ in a copy
    assert type(copied) is type(snn) and snn._hub_mixin_config is None
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(copied(images), snn(images))
    with pytest.raises(pickle.PicklingError, match="SpikingResNet"):  # as before: classes made at run time
        pickle.dumps(snn)


@pytest.mark.parametrize("name", ["steps", "predict", "card", "push_to_hub", "spec", "_traverse"])
def test_modules_cannot_take_the_place_of_methods(name):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    network.add_module(name, nn.Identity())
    with pytest.raises(ValueError, match=rf"a name that is taken: \['{name}'\]"):
        as_spiking(network, timesteps=2, algorithm="rate_m", in_chans=1, spec={"kind": "toy"})


def test_from_pretrained_takes_no_arguments_of_the_network_and_no_other_class(tmp_path):
    twin().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"from_pretrained takes \['cache_dir', .*'token'\], found \['timesteps'\]"):
        SpikingNetwork.from_pretrained(tmp_path, timesteps=2)
    vgg = type(create_snn("vgg11_cifar", width=8))
    with pytest.raises(ValueError, match="holds a SpikingResNet, not a SpikingVGG"):
        vgg.from_pretrained(tmp_path)


# -- from the hub -------------------------------------------------------------------------------------


def test_an_id_is_downloaded_with_what_the_user_said_and_nothing_but_the_files_of_a_network(hub):
    snn, images = twin(), torch.rand(2, 3, 16, 16)
    snn.save_pretrained(hub.root / "me" / "my-snn.v1")
    asked = dict(revision="v2", cache_dir="cache", token="secret", local_files_only=True, force_download=False)
    for load in (load_snn, SpikingNetwork.from_pretrained):
        assert torch.equal(load("me/my-snn.v1", **asked)(images), snn(images))
    files = ["config.json", "model.safetensors", "README.md"]
    assert hub.asked == [asked | {"allow_patterns": files}] * 2
    load_snn("me/my-snn.v1")
    assert hub.asked[2] == {"allow_patterns": files}


def test_a_folder_comes_before_an_id(hub):
    snn = twin()
    snn.save_pretrained("me/mine")
    assert load_snn("me/mine").timesteps == 3 and hub.asked == []


@pytest.mark.parametrize("name", ["nothing", "./me/mine", "../me", "me/mine/deep", "/me/mine", "me\\mine", "~/mine"])
def test_what_is_no_id_is_asked_of_nobody(hub, name):
    with pytest.raises(FileNotFoundError, match=r"holds no saved spiking network: config\.json is missing") as error:
        load_snn(name)
    assert hub.asked == [] and str(error.value).startswith(name)


def test_errors_of_the_hub_name_the_id_and_the_revision_in_one_line(hub):
    expected = (
        r"there is no folder 'runs/student', and the hub gives no network of this name at revision 'v7': "
        r"LocalEntryNotFoundError: no such repository: runs/student$"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        load_snn("runs/student", revision="v7")
    (hub.root / "me" / "empty").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"^me/empty holds no saved spiking network: config\.json"):
        load_snn("me/empty")


def test_pickles_of_the_hub_are_not_read(hub):
    twin().save_pretrained(hub.root / "me" / "pickled")
    (hub.root / "me" / "pickled" / "model.safetensors").rename(hub.root / "me" / "pickled" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_snn("me/pickled")


def test_local_folder_gives_folders_as_they_are(hub, tmp_path):
    assert local_folder(tmp_path) == tmp_path and local_folder(str(tmp_path / "none")) == tmp_path / "none"


# -- to the hub ---------------------------------------------------------------------------------------


def test_push_to_hub_uploads_the_folder(monkeypatch, tmp_path):
    calls = []

    class Api:
        def __init__(self, **kwargs):
            calls.append(("HfApi", kwargs))

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create_repo", repo_id, private, exist_ok))
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, repo_id, commit_message, revision, **kwargs):
            calls.append(("upload_folder", repo_id, commit_message, revision))
            shown = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            for name, content in shown.items():
                (tmp_path / name).write_bytes(content)
            return "https://hub/commit/1"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    snn, images = twin(), torch.rand(2, 3, 16, 16)
    url = snn.push_to_hub("me/mine", private=True, token="secret", branch="dev", commit_message="first")
    assert url == "https://hub/commit/1"
    assert calls == [
        ("HfApi", {"token": "secret"}),
        ("create_repo", "me/mine", True, True),
        ("upload_folder", "me/mine", "first", "dev"),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert torch.equal(load_snn(tmp_path)(images), snn(images))
    calls.clear()
    snn.save_pretrained(tmp_path / "mine", push_to_hub=True, token="secret")
    assert calls[1:] == [
        ("create_repo", "mine", None, True),
        ("upload_folder", "mine", "Push model using huggingface_hub.", None),
    ]
    calls.clear()
    snn.fc = nn.Linear(8, 5)
    with pytest.raises(ValueError, match="changed by hand"):
        snn.push_to_hub("me/mine")
    assert calls == []  # no repository is made for it


def test_the_cards_head_is_yaml():
    text = str(spiking(Residual(NeuronConfig()), 2).generate_model_card())
    head = yaml.safe_load(text.split("---")[1])
    assert head["tags"] == ["spiking-neural-network", "image-classification"]
