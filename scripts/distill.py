"""Distils a timm teacher into a spiking network: accelerate launch scripts/distill.py [--config RECIPE] [--help]"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where distill.py would hide the package of the same name
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill import cli, distillation, session
from distill.config import DistillConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main() -> None:
    recipe = cli.recipe_for(sys.argv[1:], CONFIGS / "digits.yaml", CONFIGS / "pretrained.yaml")
    config, resume, text, allow_changed = cli.parse(DistillConfig, None, recipe)
    distillation.run(config, session.start(config.run, resume, text, allow_changed), resume)


if __name__ == "__main__":
    cli.run(main)
