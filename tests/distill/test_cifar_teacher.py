"""The real teacher of the CIFAR-10 recipe, where the data are at hand (DISTILL_DATA, else ../shared/data)."""

import os
from pathlib import Path

import pytest
import torch

from distill import DistillConfig, cli
from distill.data import load_data
from distill.teachers import build_teacher, teacher_preprocessing

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("DISTILL_DATA", ROOT.parent / "shared" / "data"))
WEIGHTS = FOLDER / "teachers" / "resnet18_w32_cifar10.safetensors"


@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"no {WEIGHTS.name} in DISTILL_DATA or ../shared/data")
def test_the_recipes_teacher_loads_and_knows_cifar10():
    argv = ["--config", str(ROOT / "configs" / "cifar10_resnet18.yaml"), "--teacher.weights", str(WEIGHTS)]
    argv += ["--data.root", str(FOLDER / "cifar10"), "--data.train_split", "test", "--data.max_train_samples", "10"]
    config, *_ = cli.parse(DistillConfig, [*argv, "--data.eval_split", "test", "--data.max_eval_samples", "1000"])
    data = load_data(config.data, teacher_preprocessing(config.teacher))
    assert data.classes[0] == "airplane" and data.classes[9] == "truck"
    teacher = build_teacher(config.teacher, len(data.classes)).eval().to(memory_format=torch.channels_last)
    correct = 0
    with torch.no_grad():
        for start in range(0, len(data.eval), 250):
            images, labels = zip(*(data.eval[i] for i in range(start, start + 250)), strict=True)
            correct += (teacher(torch.stack(images)).argmax(1) == torch.tensor(labels)).sum().item()
    assert len(data.eval) == 1000 and correct >= 870
