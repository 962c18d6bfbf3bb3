"""scripts/predict.py's job: the pixels are those of evaluation, the lines those of the network's numbers."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_hybrid_network import distiller_of, images_of
from toy_networks import calibrated
from toy_runs import TEACHER

from distill import DataConfig, cli, save_hybrid
from distill.data import Preprocessing, load_data
from distill.prediction import PredictionConfig, run
from distill.results import image_extra
from models import create_ann, save_snn, spiking_twin

PRE = Preprocessing(input_size=(1, 8, 8), mean=(0.3,), std=(0.4,))


@pytest.fixture
def student(tmp_path):
    """A network of digits, in a folder as a run leaves it; and what the data says."""
    torch.manual_seed(0)
    data = load_data(DataConfig(max_eval_samples=6), PRE)
    ann = create_ann("resnet18", 10, in_chans=1, cifar_stem=True, kwargs=TEACHER["kwargs"])
    images = torch.stack([data.train[number][0] for number in range(32)])
    snn = calibrated(spiking_twin(ann, timesteps=3, input_size=(1, 8, 8)), images)  # steps differ from one another
    save_snn(snn, tmp_path / "student", image_extra(PRE, data))
    return snn, data, tmp_path / "student"


def as_files(folder, data):
    """The held-out digits as image files."""
    paths = []
    for number in range(len(data.eval)):
        pixels = (data.eval[number][0][0] * PRE.std[0] + PRE.mean[0]) * 255
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(pixels.round().numpy().astype(np.uint8)).save(paths[-1])
    return paths


def test_files_are_seen_as_evaluation_sees_them(student, tmp_path, capsys):
    snn, data, folder = student
    images = torch.stack([data.eval[number][0] for number in range(len(data.eval))])
    paths = as_files(tmp_path, data)
    found = run(PredictionConfig(images=paths, model=str(folder), topk=2))
    logits = torch.stack([prediction.logits for prediction in found])
    torch.testing.assert_close(logits, snn(images).detach(), rtol=1e-6, atol=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == paths[0] and lines[3] == paths[1] and len(lines) == 3 * len(paths)
    probabilities, classes = snn(images)[0].softmax(0).topk(2)
    expected = [f"{100 * p:.2f} %  {data.classes[k]}" for p, k in zip(probabilities, classes, strict=True)]
    assert [line.strip() for line in lines[1:3]] == expected


def test_other_numbers_of_steps_and_an_early_exit(student, tmp_path, capsys):
    snn, data, folder = student
    paths = as_files(tmp_path, data)[:1]
    snn.timesteps = 5
    (found,) = run(PredictionConfig(images=paths, model=str(folder), timesteps=5))
    expected = snn(data.eval[0][0][None])[0].detach()
    torch.testing.assert_close(found.logits, expected, rtol=1e-6, atol=1e-6)
    snn.timesteps = 3
    assert not torch.allclose(snn(data.eval[0][0][None])[0], expected)
    (found,) = run(PredictionConfig(images=paths, model=str(folder), early_exit=1e-9))
    assert found.timesteps == 1 and f"{paths[0]} (after 1 step)" in capsys.readouterr().out


def test_hybrids_are_asked_in_the_same_way(tmp_path, capsys):
    hybrid, images = distiller_of("resnet18").hybrid("layer1"), images_of(torch.float64, 1)
    _, channels, height, width = images.shape
    extra = {"input_size": [channels, height, width], "mean": [0.5] * channels, "std": [0.5] * channels}
    save_hybrid(hybrid, tmp_path / "hybrid", (channels, height, width), extra)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    config = PredictionConfig(images=[str(tmp_path / "image.png")], model=str(tmp_path / "hybrid"))
    (found,) = run(config)
    values = (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(found.logits, hybrid(values.double()[None])[0].detach(), rtol=1e-9, atol=1e-9)
    assert len(capsys.readouterr().out.splitlines()) == 1 + min(5, len(found.logits))
    with pytest.raises(ValueError, match=r"early_exit is 0.5; a hybrid has no logits of single steps"):
        run(PredictionConfig(images=config.images, model=config.model, early_exit=0.5))


def test_images_are_given_by_their_place():
    config = cli.parse(PredictionConfig, ["a.png", "b.png", "--model", "here"], None, False, "images").config
    assert config == PredictionConfig(images=["a.png", "b.png"], model="here")
    config = cli.parse(PredictionConfig, ["--model", "here", "--topk", "3", "a.png"], None, False, "images").config
    assert config.images == ["a.png"] and config.topk == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png"], "model"),
        (["--model", "here"], "images"),
        (["a.png", "--model", "here", "--topk", "0"], "topk must be at least 1, found 0"),
        (["a.png", "--model", "here", "--early_exit", "2"], "early_exit must be in (0, 1], or none, found 2.0"),
        (["a.png", "--model", "here", "--top", "2"], "top"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.parse(PredictionConfig, arguments, None, False, "images")
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_broken_image_is_one_line_and_status_2(student, tmp_path, capsys):
    _, data, folder = student
    paths = [*as_files(tmp_path, data)[:1], str(tmp_path / "broken.png")]
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: run(PredictionConfig(images=paths, model=str(folder))))
    shown = capsys.readouterr()
    assert stop.value.code == 2 and shown.out == "" and len(shown.err.splitlines()) == 1
    assert f": error: cannot read the image {paths[1]}: " in shown.err


def test_what_is_missing_is_named(student, tmp_path):
    _, _, folder = student
    (tmp_path / "broken.png").write_text("no image")
    for image, message in (("none.png", "there is no image at"), ("broken.png", "cannot read the image .*broken.png")):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            run(PredictionConfig(images=[str(tmp_path / image)], model=str(folder)))
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no saved network: config\.json is missing"):
        run(PredictionConfig(images=["a.png"], model=str(tmp_path / "nowhere")))
