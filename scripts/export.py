"""Writes what a run has left as others read it: python scripts/export.py --model runs/NAME/student --out DIR"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where distill.py would hide the package of the same name
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill import cli
from distill.export import ExportConfig, running


def main() -> None:
    running.run(cli.parse(ExportConfig, None, resumable=False).config)


if __name__ == "__main__":
    cli.run(main, resumable=False)
