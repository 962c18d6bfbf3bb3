"""Names what is on images: python scripts/predict.py IMAGE... --model runs/NAME/student (or a hybrid, or a hub id)"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where distill.py would hide the package of the same name
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill import cli, prediction
from distill.prediction import PredictionConfig


def main() -> None:
    prediction.run(cli.parse(PredictionConfig, None, resumable=False, positional="images").config)


if __name__ == "__main__":
    cli.run(main, resumable=False)
