"""Runs the rows of the study, and makes tables and plots of those that have been run.

    python -m benchmarks.study run --data DIR --teacher FILE [ROW ...]
    python -m benchmarks.study table --runs DIR

run: without names, all rows that are missing; a row that was cut off goes on, one that fails does not keep the others
from running. DIR holds train.tar and test.tar of CIFAR-10.
table: first collects the figures of the runs that have ended, which add up over machines and sessions.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.study.ablations import ALL_ROWS, ablation_rows
from benchmarks.study.rows import ROWS, SCALES
from benchmarks.study.running import REPOSITORY, Place, RowFailed, run_row

RESULTS = REPOSITORY / "benchmarks" / "results" / "study"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="run rows, or all that are missing")
    add = run.add_argument
    add("rows", nargs="*", metavar="ROW", help=f"of {list(ALL_ROWS)}; default: {list(ROWS)}")
    add("--ablations", action="store_true", help="without names: the rows of the ablations instead")
    add("--data", type=Path, required=True, metavar="DIR", help="folder with train.tar and test.tar")
    add(
        "--teacher",
        type=Path,
        required=True,
        metavar="FILE",
        help="weights of the teacher: resnet18_w32_cifar10, or of full width",
    )
    add("--runs", type=Path, default=Path("runs/study"), help="parent of the run folders")
    add("--scale", choices=list(SCALES), default="full")
    add("--precision", choices=("no", "bf16"), default="bf16")
    add("--threads", type=int)
    add("--seeds", type=int, nargs="+", help="default: those of the row")
    run.set_defaults(function=_run)
    table = commands.add_parser("table", help="make tables and plots")
    add = table.add_argument
    add("--runs", type=Path, help="parent of the run folders; default: what was collected before")
    add("--scale", choices=list(SCALES), default="full")
    add("--ablations", action="store_true", help="the tables of the ablations instead")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="where figures, tables and plots are kept")
    table.set_defaults(function=_table)
    args = parser.parse_args(argv)
    args.function(args, parser)


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if unknown := sorted(set(args.rows) - ALL_ROWS.keys()):
        parser.error(f"unknown rows {unknown}; known are {list(ALL_ROWS)}")
    names = args.rows or (ablation_rows(args.scale) if args.ablations else list(ROWS))
    try:
        place = Place(
            runs=args.runs.resolve(),
            data=args.data.resolve(),
            teacher=args.teacher.resolve(),
            scale=args.scale,
            precision=args.precision,
            threads=args.threads,
        )
        todo = [(name, seed) for name, seed in _runs(names, args.seeds) if not place.is_done(name, seed)]
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl-C, not at once
    failed = []
    try:
        for number, (name, seed) in enumerate(todo, start=1):
            print(f"{number}/{len(todo)}: {name}, seed {seed}: {place.folder(name, seed)}", flush=True)
            try:
                run_row(place, name, seed)
            except RowFailed as failure:
                print(failure, file=sys.stderr, flush=True)
                failed.append(f"{name}, seed {seed}")
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if failed:
        print(f"{len(failed)} of {len(todo)} runs failed: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def _runs(names: list[str], seeds: list[int] | None) -> list[tuple[str, int]]:
    """Rows and seeds, a seed of all rows before the next."""
    wanted = {name: seeds if seeds is not None else list(range(ALL_ROWS[name].seeds)) for name in names}
    order = sorted({seed for each in wanted.values() for seed in each})
    return [(name, seed) for seed in order for name, each in wanted.items() if seed in each]


def _table(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    # here, because Matplotlib and PyTorch must not be in the memory of a process that starts runs
    from benchmarks.study.records import collect
    from benchmarks.study.writing import write_ablations, write_study

    if args.runs is not None and not args.runs.is_dir():
        parser.error(f"--runs {args.runs} is no folder")
    if args.runs is not None:
        collect(args.runs, args.scale, args.results)
    files = sorted(args.results.glob(f"{args.scale}_*.jsonl"))
    if not files:
        parser.error(f"nothing was measured: there is no {args.scale}_*.jsonl in {args.results}")
    for file in files:
        for path in (write_ablations if args.ablations else write_study)(file):
            print(path)


if __name__ == "__main__":
    main()
