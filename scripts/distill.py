"""Distils a timm teacher into a spiking network: accelerate launch scripts/distill.py [--config RECIPE] [--help]"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where distill.py would hide the package of the same name
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill import cli, distillation, session
from distill.config import DistillConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main() -> None:
    config, resume, text, allow_changed = cli.parse(
        DistillConfig, None, CONFIGS / "digits.yaml", pretrained_recipe=CONFIGS / "pretrained.yaml"
    )
    distillation.run(config, session.start(config.run, resume, text, allow_changed), resume)


if __name__ == "__main__":
    cli.run(main)
