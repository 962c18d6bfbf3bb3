"""The export format `snn`: a folder that gives the network back bit for bit, and says what the run found."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from test_hybrid_network import distiller_of, images_of
from toy_networks import calibrated
from toy_runs import TEACHER

from distill import load_hybrid, save_hybrid
from distill.export import snn as snn_format
from distill.export.config import ExportConfig
from distill.export.job import Job
from distill.report import model_card
from models import PoissonEncoder, create_ann, create_snn, load_snn, save_snn, spiking_twin
from models.card import CARD

SUMMARY = {
    "teacher_top1": 90.0,
    "hybrid_top1": {"layer1": 80.5},
    "student_top1": 60.0,
    "student_top1_by_timesteps": {4: 60.0},
    "timesteps": 4,
    "algorithm": "rate_m",
    "parameters": 15066,
    "mean_firing_rate": 0.125,
    "versions": {"torch": "9.9"},
}


def job(network, samples, tmp_path, model="runs/x/student"):
    folder = tmp_path / "out"
    folder.mkdir()
    return Job(network=network, samples=samples, folder=folder, config=ExportConfig(model=model, out="unused"))


def student():
    ann = create_ann("resnet18", 10, in_chans=1, cifar_stem=True, kwargs=TEACHER["kwargs"])
    snn = calibrated(spiking_twin(ann, timesteps=2, input_size=(1, 8, 8)), torch.randn(32, 1, 8, 8))
    snn.spec["extra"] = {"input_size": [1, 8, 8], "mean": [0.3], "std": [0.4], "classes": list("0123456789")}
    return snn


def test_a_student_comes_back_bit_for_bit_with_its_card(tmp_path):
    save_snn(student(), tmp_path / "run")
    card = model_card(SUMMARY, "resnet18", "digits", "train:\n  epochs: 3\n")
    (tmp_path / "run" / CARD).write_text(card)
    snn, samples = load_snn(tmp_path / "run"), torch.randn(70, 1, 8, 8)
    given = job(snn, samples, tmp_path)
    check = snn_format.export(given)
    assert check.passed and check.figures == {"images": 64, "equal_bit_for_bit": 64}
    assert "64 of 64 images are equal bit for bit" in check.line
    assert {path.name for path in given.folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    loaded = load_snn(given.folder)
    assert torch.equal(loaded(samples), snn(samples)) and loaded.spec["extra"] == snn.spec["extra"]
    text = (given.folder / CARD).read_text()
    for part in ("60.00", "epochs: 3", "load_snn(", "## Licence", "@inproceedings{"):
        assert part in text
    for path in (given.folder / "config.json", given.folder / CARD):
        assert str(tmp_path) not in path.read_text()


def test_other_numbers_do_not_pass(tmp_path, monkeypatch):
    def one_weight_off(folder):
        snn = load_snn(folder)
        with torch.no_grad():
            snn.fc.bias[0] += 1e-6
        return snn

    monkeypatch.setattr(snn_format, "load_snn", one_weight_off)
    check = snn_format.export(job(student(), torch.randn(5, 1, 8, 8), tmp_path))
    assert not check.passed and check.figures == {"images": 5, "equal_bit_for_bit": 0}


def test_frames_and_poisson_input_are_compared_on_the_same_spikes(tmp_path):
    snn = create_snn("resnet18_cifar", width=8, timesteps=3, encoder=PoissonEncoder()).double().eval()
    (tmp_path / "images").mkdir()
    check = snn_format.export(job(snn, torch.rand(4, 3, 16, 16), tmp_path / "images"))
    assert check.passed and check.figures["images"] == 4
    (tmp_path / "frames").mkdir()
    check = snn_format.export(job(snn, torch.randn(3, 66, 3, 8, 8), tmp_path / "frames"))
    assert check.passed and check.figures["images"] == 64


@pytest.mark.parametrize("of_a_run", [True, False])
def test_a_hybrid_comes_back_bit_for_bit_with_its_accuracy(tmp_path, of_a_run):
    hybrid, images = distiller_of("resnet18").hybrid("layer1"), images_of(torch.float64, 3)
    hybrid.spec["extra"] = {"input_size": list(images.shape[1:])}
    run = tmp_path / "run"
    (run / "hybrids" / "layer1").mkdir(parents=True)
    hybrid.timesteps = 4  # as in the run
    if of_a_run:
        (run / "summary.json").write_text(json.dumps(SUMMARY))
        (run / "config.yaml").write_text("train:\n  epochs: 3\n")
    given = job(hybrid, images, tmp_path, str(run / "hybrids" / "layer1"))
    assert snn_format.export(given).passed
    assert torch.equal(load_hybrid(given.folder)(images), hybrid(images))
    text = (given.folder / CARD).read_text()
    assert "up to `layer1`" in text and "Saved with" not in text
    assert ("80.50 %" in text and "epochs: 3" in text) == of_a_run
    hybrid.timesteps = 1  # another T than that of the figures
    (tmp_path / "other").mkdir()
    given = job(hybrid, images, tmp_path / "other", str(run / "hybrids" / "layer1"))
    assert snn_format.export(given).passed
    text = (given.folder / CARD).read_text()
    note = "Saved with 1 time steps; what follows was measured with 4."
    assert (note in text and "of 4 time steps" in text) if of_a_run else "of 1 time steps" in text
    assert of_a_run or "Saved with" not in text
    hybrid.spec["extra"] = {}
    with pytest.raises(ValueError, match=r"runs/x/hybrids/layer1 does not say how large its images are"):
        snn_format.export(Job(hybrid, images, tmp_path, ExportConfig(model="runs/x/hybrids/layer1", out="unused")))


def test_the_card_that_a_hybrid_came_with_comes_along(tmp_path):
    hybrid = distiller_of("resnet18").hybrid("layer1")
    size = images_of().shape[1:]
    save_hybrid(hybrid, tmp_path / "from_the_hub", size, {"input_size": list(size)})
    (tmp_path / "from_the_hub" / CARD).write_text("---\nlicense: mit\n---\n# Mine\n\n98.76 % top-1\n")
    loaded = load_hybrid(tmp_path / "from_the_hub")
    given = job(loaded, images_of(torch.float64, 3), tmp_path, str(tmp_path / "from_the_hub"))
    assert snn_format.export(given).passed
    card = ModelCard.load(given.folder / CARD)
    assert card.data.license == "mit" and card.text.strip() == "# Mine\n\n98.76 % top-1"
    again = load_hybrid(given.folder)
    again.timesteps = 5
    (tmp_path / "other").mkdir()
    given = job(again, images_of(torch.float64, 3), tmp_path / "other")
    assert snn_format.export(given).passed
    text = (given.folder / CARD).read_text()
    assert "Saved with 5 time steps; what follows was measured with 2." in text and "98.76 % top-1" in text
