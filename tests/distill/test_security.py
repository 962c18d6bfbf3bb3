"""Nothing that a run reads can run code or reach out of its folder; each try here would leave a mark if it could."""

import hashlib
import json
import pickle

import pytest
import torch
import yaml
from test_checkpoints import save
from toy_runs import TEACHER, distil, rewrite_manifest, tiny

from distill import DistillConfig, RunConfig, TeacherConfig, cli
from distill.checkpoints import Checkpoints, damage_of
from distill.hybrid_network import load_hybrid
from distill.teachers import build_teacher
from models import create_ann, load_snn


class Mark:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def mark(tmp_path):
    """A file that must not appear."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["teacher.pth", "teacher.safetensors", "model.safetensors"])
def test_a_pickle_given_as_weights_is_refused_with_the_way_to_convert_it(tmp_path, mark, name):
    torch.save({"conv1.weight": Mark(mark)}, tmp_path / name)
    path = tmp_path if name == "model.safetensors" else tmp_path / name
    with pytest.raises(ValueError, match=r"is not a safetensors file.*python -c .*weights_only=True"):
        build_teacher(TeacherConfig(**TEACHER, weights=str(path)), 10)


def test_the_way_to_convert_it_works_and_runs_nothing(tmp_path, mark):
    network = build_teacher(TeacherConfig(**TEACHER), 10)
    torch.save(network.state_dict(), tmp_path / "good.pth")
    torch.save({"conv1.weight": Mark(mark)}, tmp_path / "bad.pth")
    for name in ("good", "bad"):
        with pytest.raises(ValueError) as refused:
            build_teacher(TeacherConfig(**TEACHER, weights=str(tmp_path / f"{name}.pth")), 10)
        command = str(refused.value).split('python -c "')[1].split('"')[0]
        if name == "bad":
            with pytest.raises(pickle.UnpicklingError):
                exec(command)
        else:
            exec(command)
    again = build_teacher(TeacherConfig(**TEACHER, weights=str(tmp_path / "good.safetensors")), 10)
    assert torch.equal(again.conv1.weight, network.conv1.weight)


@pytest.mark.parametrize("file", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_a_pickle_slipped_into_a_checkpoint_runs_nothing(tmp_path, mark, file):
    config = tiny(tmp_path / "r", train=dict(epochs=1, batch_size=16, lr=0.05), save_hybrids=False)
    distil(config)
    (tmp_path / "r" / "summary.json").unlink()
    checkpoint = Checkpoints(tmp_path / "r" / "checkpoints" / "student").newest().path
    torch.save({"state": Mark(mark)}, checkpoint / file)
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    rewrite_manifest(checkpoint, files=files | {file: hashlib.sha256((checkpoint / file).read_bytes()).hexdigest()})
    if file.startswith("random"):  # which Accelerate passes over
        distil(config, resume=True)
    else:
        with pytest.raises(ValueError, match="does not fit what is trained now"):
            distil(config, resume=True)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_cannot_name_files_outside(tmp_path, name):
    checkpoints = Checkpoints(tmp_path / "student")
    save(checkpoints, 1)
    (tmp_path / "student" / "outside").write_text("")
    path = checkpoints.newest().path
    rewrite_manifest(path, files={name: hashlib.sha256(b"").hexdigest()})
    assert damage_of(path) == f"{name} is outside of it" and checkpoints.newest(say=False) is None


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../a", "a\\b"])
def test_a_runs_name_cannot_lead_out_of_the_folder_of_runs(name):
    with pytest.raises(ValueError, match="name"):
        RunConfig(name=name)


def test_a_recipe_cannot_make_objects(tmp_path, mark, capsys):
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(f"run: !!python/object/apply:builtins.open ['{mark}', 'w']\n")
    with pytest.raises(SystemExit):
        cli.parse(DistillConfig, ["--config", str(recipe)])
    made = {"class_path": "builtins.open", "init_args": {"file": str(mark), "mode": "w"}}
    recipe.write_text(yaml.safe_dump({"teacher": {"kwargs": {"act_layer": made}}}))
    config = cli.parse(DistillConfig, ["--config", str(recipe)]).config
    assert config.teacher.kwargs == {"act_layer": made}  # a dictionary, as it was written


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"])
def test_arguments_of_a_network_cannot_name_files(argument):
    with pytest.raises(ValueError, match=rf"\['{argument}'\] would read files"):
        create_ann("resnet18", kwargs={argument: "somewhere"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrained": True}, r"found \['pretrained'\]"),
        ({"name": "hf_hub:someone/something"}, "as timm names it"),
        ({"name": "local-dir:/tmp"}, "as timm names it"),
        ({"kwargs": {"checkpoint_path": "evil.pth"}}, "would read files"),
    ],
)
def test_a_saved_network_cannot_ask_for_files_or_the_hub(tmp_path, change, message):
    distil(tiny(tmp_path / "r", train=dict(epochs=1, batch_size=16, lr=0.05)))
    for folder, key, load in (("student", "ann", load_snn), ("hybrids/layer1", "teacher", load_hybrid)):
        path = tmp_path / "r" / folder / "config.json"
        spec = json.loads(path.read_text())
        spec[key] |= change
        path.write_text(json.dumps(spec))
        with pytest.raises(ValueError, match=message):
            load(path.parent)
