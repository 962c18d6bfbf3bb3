"""scripts/export.py's job: what is kept, what is refused, what a failed check leaves."""

import builtins
import dataclasses
import importlib
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from export_toys import EXTRA, images, saved
from toy_networks import calibrated

from distill import DataConfig
from distill.export import ExportConfig, extras, nir_graph, onnx_file, running, spikingjelly_code, torch_program
from distill.export import snn as snn_format
from distill.export.leaves import Neuron
from distill.export.samples import samples_for
from models import NeuronConfig, PoissonEncoder, create_snn, load_snn, save_snn

SPIKINGJELLY = {"network.py", "network.safetensors", "network.json", "check.json"}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("run") / "student")


def config(student, out, **settings):
    return ExportConfig(model=str(student), out=str(out), **{"format": "spikingjelly", "samples": 100} | settings)


def test_what_passes_is_kept_with_its_figures(student, tmp_path):
    out = tmp_path / "deep" / "out"
    result = running.run(config(student, out, timesteps=3))
    assert {path.name for path in out.iterdir()} == SPIKINGJELLY
    assert json.loads((out / "check.json").read_text()) == result
    assert result["passed"] and result["timesteps"] == 3 and result["format"] == "spikingjelly"
    assert result["float64"]["largest_difference"] <= result["float64"]["bound"] == pytest.approx(1e-9, rel=10)
    assert result["spikingjelly"]["images"] == 100 and result["versions"]["torch"] == torch.__version__.split("+")[0]
    about = json.loads((out / "network.json").read_text())
    assert about == EXTRA | {"input_size": [1, 16, 16], "timesteps": 3, "input": "images", "encoder": None}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    snn = load_snn(student)
    snn.timesteps = 3
    assert (spikingjelly_code.load(out)(images(4, (1, 16, 16))) - snn(images(4, (1, 16, 16)))).abs().max() < 1e-4


def test_a_failed_check_leaves_nothing_and_says_why(student, tmp_path, monkeypatch):
    monkeypatch.setattr(Neuron, "tau", 4.0)  # another leak than the network's
    (tmp_path / "out").mkdir()
    with pytest.raises(
        running.CheckError, match=r"float64: largest difference of a logit \S+ on 16 images \(at most 1"
    ):
        running.run(config(student, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").iterdir())


def test_a_folder_with_files_is_left_alone(student, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"out must be a new or empty folder, found .*--overwrite true"):
        running.run(config(student, out))
    with pytest.raises(
        ValueError, match=r"overwrite replaces what an earlier export has left, found none in .*check.json"
    ):
        running.run(config(student, out, overwrite=True))
    assert (out / "thesis.tex").read_text() == "years of work"


def test_an_earlier_export_is_replaced_where_that_is_asked_for(student, tmp_path, monkeypatch):
    out = tmp_path / "out"
    running.run(config(student, out, format="snn"))
    (out / "__pycache__").mkdir()
    with pytest.raises(ValueError, match="--overwrite true"):
        running.run(config(student, out))
    running.run(config(student, out, overwrite=True))
    assert {path.name for path in out.iterdir()} == SPIKINGJELLY
    monkeypatch.setattr(Neuron, "tau", 4.0)
    with pytest.raises(running.CheckError):
        running.run(config(student, out, overwrite=True))
    assert (out / "check.json").exists()  # what was there stays until something better is


def test_what_no_export_has_left_is_never_removed(student, tmp_path):
    out = tmp_path / "out"
    running.run(config(student, out, format="snn"))
    for name in (".git", "nested", "plots", "weights"):
        (out / name).mkdir()
        (out / name / "HEAD").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds 4 other things, too: \['.git', 'nested', 'plots'\]"):
        running.run(config(student, out, overwrite=True))
    assert (out / ".git" / "HEAD").read_text() == "years of work" and load_snn(out)


def test_the_files_of_every_format_may_be_replaced():
    files = {onnx_file.FILE, nir_graph.FILE, torch_program.PROGRAM, spikingjelly_code.CODE, spikingjelly_code.WEIGHTS}
    assert files <= running.OURS


def test_a_link_stays_one_and_what_it_points_to_is_replaced(student, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    running.run(config(student, tmp_path / "link"))
    running.run(config(student, tmp_path / "link", timesteps=1, overwrite=True))
    assert (tmp_path / "link").is_symlink() and {path.name for path in tmp_path.iterdir()} == {"disk", "link"}
    assert {path.name for path in (tmp_path / "disk").iterdir()} == SPIKINGJELLY
    assert json.loads((tmp_path / "disk" / "check.json").read_text())["timesteps"] == 1


def test_a_mount_point_is_refused_before_the_work(student, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "out")
    monkeypatch.setattr(running, "load_network", Mock(side_effect=AssertionError("work has begun")))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"found the mount point .*out: name a folder inside of it"):
        running.run(config(student, tmp_path / "out"))


def test_an_earlier_export_stays_where_it_cannot_be_replaced(student, tmp_path, monkeypatch):
    out = tmp_path / "out"
    running.run(config(student, out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    real = Path.rename

    def busy(self, target):
        if Path(target) == out and "earlier" not in self.name:
            raise OSError(16, "Device or resource busy")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OSError, match=r"out cannot be replaced: .*busy; name a folder inside of it"):
        running.run(config(student, out, overwrite=True))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_model_itself_is_never_replaced(student, tmp_path):
    for out in (student, student.parent):
        with pytest.raises(ValueError, match="out must be another folder than the model's"):
            running.run(config(student, out, overwrite=True))
    assert load_snn(student)


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("nir", "nir")])
def test_a_missing_package_is_named_with_its_extra(student, tmp_path, monkeypatch, format, package):
    there = importlib.import_module

    def hidden(name, *args):
        if name == package:
            raise ImportError(name)
        return there(name, *args)

    monkeypatch.setattr(extras.importlib, "import_module", hidden)
    own_import = builtins.__import__

    def refused(name, *args, **kwargs):
        assert name.partition(".")[0] != package, "imported before it was asked for"
        return own_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refused)
    with pytest.raises(ValueError, match=rf"format {format} needs .*{package}.*pip install 'spikeswap\[{format}\]'"):
        running.run(config(student, tmp_path / "out", format=format))
    assert not (tmp_path / "out").exists()


def test_samples_are_held_out_images_then_training_images(student):
    snn = load_snn(student)
    few = samples_for(config(student, "out", samples=100), snn)
    many = samples_for(config(student, "out", samples=500), snn)
    assert few.shape == (100, 1, 16, 16) and many.shape == (500, 1, 16, 16) and torch.equal(few, many[:100])
    data = DataConfig(max_eval_samples=70, max_train_samples=40)
    assert len(samples_for(config(student, "out", samples=500, data=data), snn)) == 110  # all that there are
    with pytest.raises(ValueError, match=r"data\.name=digits has 90 images, a check needs 100.*--check_images random"):
        samples_for(config(student, "out", data=DataConfig(max_eval_samples=70, max_train_samples=20)), snn)
    assert samples_for(config(student, "out", input="frames"), snn).shape == (2, 100, 1, 16, 16)


def test_noise_stands_in_for_data(student):
    noise = samples_for(config(student, "out", check_images="random"), load_snn(student))
    values = noise * 0.4 + 0.3  # back from the normalisation
    assert noise.shape == (100, 1, 16, 16) and 0 <= values.min() < 0.01 and 0.99 < values.max() <= 1.0001
    frames = samples_for(config(student, "out", check_images="random", input="frames"), load_snn(student))
    # of N = 100 images: the same frame twice, or steps in another order, would go unseen
    assert frames.shape == (2, 100, 1, 16, 16) and not (frames[0] == frames[1]).flatten(1).all(1).any()


def test_an_event_network_is_given_frames_where_noise_stands_in_for_data(tmp_path):
    snn = create_snn("vggsnn_dvs", timesteps=3, in_chans=2, width=8)
    events = EXTRA | {"input_size": [2, 16, 16], "mean": [0.1, 0.1], "std": [0.4, 0.4]}
    save_snn(snn, tmp_path / "student", events)
    asked = config(tmp_path / "student", "out", check_images="random")
    assert samples_for(asked, load_snn(tmp_path / "student")).shape == (3, 100, 2, 16, 16)
    asked = dataclasses.replace(asked, input="images")
    assert samples_for(asked, load_snn(tmp_path / "student")).shape == (100, 2, 16, 16)


def test_data_of_other_classes_is_refused(student, tmp_path):
    data = DataConfig(name="synthetic", synthetic_classes=3)
    with pytest.raises(ValueError, match=r"has 3 classes, the network in .* knows 10 .*--check_images random"):
        running.run(config(student, tmp_path / "out", data=data))


def test_a_network_that_does_not_know_its_images_is_refused(tmp_path):
    save_snn(small_network(), tmp_path / "student")
    with pytest.raises(ValueError, match=r"extra\.input_size is missing"):
        running.run(config(tmp_path / "student", tmp_path / "out"))


def small_network(**settings):
    return create_snn("vgg11_cifar", timesteps=2, in_chans=1, width=8, **settings)


@pytest.fixture
def poisson(tmp_path):
    snn = small_network(encoder=PoissonEncoder(mean=(0.3,), std=(0.4,)), neuron=NeuronConfig(threshold=0.7))
    snn = calibrated(snn, 0.5 * torch.rand(32, 1, 16, 16))
    save_snn(snn, tmp_path / "student", EXTRA | {"input_size": [1, 16, 16]})
    return tmp_path / "student"


def test_an_encoders_spikes_are_frames(poisson, tmp_path):
    frames = samples_for(config(poisson, "out"), load_snn(poisson))
    assert frames.shape == (2, 100, 1, 16, 16) and set(frames.unique().tolist()) == {0.0, 1.0}
    running.run(config(poisson, tmp_path / "out"))
    about = json.loads((tmp_path / "out" / "network.json").read_text())
    assert about["input"] == "frames" and about["encoder"] == {"kind": "poisson", "mean": [0.3], "std": [0.4]}
    code, written = (tmp_path / "out" / "network.py").read_text(), spikingjelly_code.load(tmp_path / "out")
    assert "each frame has a 1 with probability p" in code and "images (B, C, H, W)" not in code
    assert written(frames[:, :3]).shape == (3, 10)
    for wrong in (frames[0], torch.cat([frames, frames]), frames[:1]):
        with pytest.raises(ValueError, match=r"takes 2 frames, \(T, B, C, H, W\), found shape"):
            written(wrong)


def test_the_check_of_snn_draws_an_encoders_spikes(poisson, tmp_path, monkeypatch):
    assert samples_for(config(poisson, "out", format="snn"), load_snn(poisson)).shape == (100, 1, 16, 16)
    assert running.run(config(poisson, tmp_path / "out", format="snn"))["equal_bit_for_bit"] == 64

    def another(folder):
        snn = load_snn(folder)
        snn.input_encoder = PoissonEncoder(mean=(0.3,), std=(0.3,))
        return snn

    monkeypatch.setattr(snn_format, "load_snn", another)
    with pytest.raises(running.CheckError, match="of 64 images are equal bit for bit"):
        running.run(config(poisson, tmp_path / "other", format="snn"))


def test_bad_settings_are_refused():
    for settings, message in (
        ({"timesteps": 0}, "timesteps must be at least 1"),
        ({"samples": 10}, "samples must be at least 100, found 10"),
        ({"format": "tflite"}, "format must be one of .*'nir'.*, found 'tflite'"),
    ):
        with pytest.raises(ValueError, match=message):
            ExportConfig(**{"model": "m", "out": "o"} | settings)


def test_an_export_of_a_float16_network_is_one_in_float32(tmp_path):
    snn = small_network().half()
    save_snn(snn, tmp_path / "student", EXTRA | {"input_size": [1, 16, 16]})
    assert running.run(config(tmp_path / "student", tmp_path / "out"))["passed"]
    assert next(spikingjelly_code.load(tmp_path / "out").parameters()).dtype == torch.float32


def test_onnx_of_a_float64_network_is_one_in_float32(tmp_path):
    """onnxruntime has no convolution of float64: it could run nothing of what was written."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    snn = calibrated(small_network().double(), images(32, (1, 16, 16)).double())
    save_snn(snn, tmp_path / "student", EXTRA | {"input_size": [1, 16, 16]})
    assert running.run(config(tmp_path / "student", tmp_path / "out", format="onnx", timesteps=1))["passed"]
    assert onnx_file.load(tmp_path / "out")(images(2, (1, 16, 16))).dtype == torch.float32
