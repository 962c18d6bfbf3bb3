"""Runs the rows of the study.

    python -m benchmarks.study run --data DIR --teacher FILE [ROW ...]

Without names, all rows that are missing; a row that was cut off goes on. DIR holds train.tar and test.tar of CIFAR-10.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.study.rows import ROWS, SCALES
from benchmarks.study.running import Place, is_done, run_row


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="run rows, or all that are missing")
    add = run.add_argument
    add("rows", nargs="*", metavar="ROW", help=f"of {list(ROWS)}")
    add("--data", type=Path, required=True, metavar="DIR", help="folder with train.tar and test.tar")
    add("--teacher", type=Path, required=True, metavar="FILE", help="weights of resnet18_w32_cifar10")
    add("--runs", type=Path, default=Path("runs/study"), help="parent of the run folders")
    add("--scale", choices=list(SCALES), default="full")
    add("--precision", choices=("no", "bf16"), default="bf16")
    add("--threads", type=int)
    add("--seeds", type=int, nargs="+", help="default: those of the row")
    run.set_defaults(function=_run)
    args = parser.parse_args()
    args.function(args, parser)


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if unknown := sorted(set(args.rows) - ROWS.keys()):
        parser.error(f"unknown rows {unknown}; known are {list(ROWS)}")
    place = Place(
        runs=args.runs.resolve(),
        data=args.data.resolve(),
        teacher=args.teacher.resolve(),
        scale=args.scale,
        precision=args.precision,
        threads=args.threads,
    )
    for name in args.rows or ROWS:
        for seed in args.seeds if args.seeds is not None else range(ROWS[name].seeds):
            if not is_done(place.folder(name, seed)):
                print(f"{name}, seed {seed}: {place.folder(name, seed)}", flush=True)
                run_row(place, name, seed)


if __name__ == "__main__":
    main()
