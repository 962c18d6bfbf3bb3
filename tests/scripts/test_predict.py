"""scripts/predict.py as a user starts it."""

import numpy as np
from PIL import Image
from test_scripts import succeed

from models import create_ann, save_snn, spiking_twin


def test_the_script_prints_the_likeliest_classes(tmp_path):
    ann = create_ann("resnet18", 3, in_chans=1, cifar_stem=True, kwargs={"channels": [8, 8, 8, 8]})
    extra = {"input_size": [1, 8, 8], "mean": [0.3], "std": [0.4], "classes": ["nought", "one", "two"]}
    save_snn(spiking_twin(ann, timesteps=2, input_size=(1, 8, 8)), tmp_path / "student", extra)
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(12, 16)).save(tmp_path / "image.png")
    done = succeed(tmp_path, "predict.py", "image.png", "image.png", "--model", "student")
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and lines[0] == lines[4] == "image.png" and lines[:4] == lines[4:] and done.stderr == ""
    shares = [float(line.split(" %")[0]) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 100) < 0.02
    assert {line.split()[-1] for line in lines[1:4]} == {"nought", "one", "two"}
