"""Trains a spiking network on labels alone: accelerate launch scripts/train_snn.py [--config RECIPE] [--help]"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where distill.py would hide the package of the same name
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill import cli, session, snn_training
from distill.config import SnnTrainingConfig

DEFAULT = Path(__file__).resolve().parent.parent / "configs" / "digits_snn.yaml"


def main() -> None:
    config, resume, text, allow_changed = cli.parse(SnnTrainingConfig, None, DEFAULT)
    snn_training.run(config, session.start(config.run, resume, text, allow_changed), resume)


if __name__ == "__main__":
    cli.run(main)
