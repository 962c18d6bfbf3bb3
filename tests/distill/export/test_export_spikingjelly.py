"""Format spikingjelly, in a process that does not have this project."""

import subprocess
import sys

import pytest
import torch
from export_toys import images, job, small
from safetensors.torch import save_file

from distill.export import FORMATS, spikingjelly_code
from models import NeuronConfig, create_snn

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("distill", "models", "timm"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Absent())
from safetensors.torch import load_file, save_file
import network

own = load_file("images.safetensors")
snn = network.load()
out = {"images": snn(own["images"]), "frames": snn(own["frames"]), "again": snn(own["images"])}
save_file({name: logits.detach() for name, logits in out.items()}, "logits.safetensors")
assert not {"distill", "models"} & set(sys.modules)
"""


def test_the_code_runs_where_this_project_is_not(tmp_path):
    snn = small(learnable_leak=True).double()
    check = FORMATS["spikingjelly"](job(snn, images(100), tmp_path, "spikingjelly"))
    assert check.passed and check.figures["float64"]["largest_difference"] <= 1e-9
    assert check.figures["spikingjelly"]["equal_predictions"] == 1.0
    frames = images(9).reshape(3, 3, 1, 8, 8).double()
    save_file({"images": images(4).double(), "frames": frames}, tmp_path / "images.safetensors")
    with pytest.raises(ValueError, match=r"takes images .* or 3 frames, .*, found shape \(9, 1, 1, 8, 8\)"):
        spikingjelly_code.load(tmp_path)(images(9)[:, None].double())
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    from safetensors.torch import load_file

    logits = load_file(tmp_path / "logits.safetensors")
    with torch.no_grad():
        assert (logits["images"] - snn(images(4).double())).abs().max() <= 1e-9
        assert (logits["frames"] - snn(frames)).abs().max() <= 1e-9
    assert torch.equal(logits["images"], logits["again"])  # no state is left behind


def test_the_code_reads_as_a_person_would_write_it(tmp_path):
    assert FORMATS["spikingjelly"](job(small(), images(100), tmp_path, "spikingjelly")).passed
    code = (tmp_path / "network.py").read_text()
    forward = [
        line.strip() for line in code.partition("def forward(self, x):\n")[2].partition("\n\n\n")[0].splitlines()
    ]
    assert forward == [
        "x = self.stem_0(x)",
        "x = self.spike1(x)",
        "y = self.conv_0(x)",
        "x = y + x",
        "x = self.spike2(x)",
        "x = F.adaptive_avg_pool2d(x, 1)",
        "x = x.flatten(1)",
        "x = self.fc(x)",
        "return x",
    ]
    assert "self.stem_0 = nn.Conv2d(1, 8, 3, stride=2, padding=1)" in code and "BatchNorm" not in code
    neuron = "neuron.LIFNode(tau=2.0, decay_input=False, v_threshold=0.7, v_reset=None"
    assert code.count(neuron) == 2 and "detach_reset=True" in code


@pytest.mark.slow
def test_a_real_size_network_passes(tmp_path):
    torch.manual_seed(0)
    snn = create_snn("resnet18_cifar", neuron=NeuronConfig(leak=1.0)).eval()
    check = FORMATS["spikingjelly"](job(snn, images(100, (3, 32, 32)), tmp_path, "spikingjelly"))
    assert check.passed, check.line
