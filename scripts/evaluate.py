"""Evaluates what a run has left: accelerate launch scripts/evaluate.py --model runs/NAME/student (or hybrids/TAP)"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where distill.py would hide the package of the same name
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill import cli, saved_evaluation
from distill.config import EvaluationConfig


def main() -> None:
    saved_evaluation.run(cli.parse(EvaluationConfig, None, resumable=False).config)


if __name__ == "__main__":
    cli.run(main, resumable=False)
