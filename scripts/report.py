"""Writes the report of a run anew, of what lies in its folder so far: python scripts/report.py --run runs/NAME"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where distill.py would hide the package of the same name
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill import cli
from distill.config import ReportConfig
from distill.html_report import write_report


def main() -> None:
    print(write_report(Path(cli.parse(ReportConfig, None, resumable=False).config.run)))


if __name__ == "__main__":
    cli.run(main, resumable=False)
