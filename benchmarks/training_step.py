"""Measures one training step and prints one line of JSON, or compares all rules with other implementations.

python benchmarks/training_step.py --network resnet18_cifar --algorithm rate_m --precision bf16
python benchmarks/training_step.py --compare --authors-path DIR --sj14-path DIR
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    # imports nothing of PyTorch: --compare must stay small, for a child's peak memory starts at that of its parent
    from benchmarks.plan import ALGORITHMS, FORMATS, GROUPS, PRECISIONS

    made = argparse.ArgumentParser(
        prog="training_step.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--network", default="resnet18_cifar", help="a name of models.list_snns()")
    add("--algorithm", default="rate_m", help="one of models.ALGORITHMS; the authors have rate_m and bptt")
    add("--timesteps", type=int, default=4, help="T")
    add("--batch", type=int, default=32, help="images a step")
    add("--precision", choices=PRECISIONS, default="fp32", help="bf16 and fp16 by autocast")
    add("--memory-format", choices=("channels_last", "contiguous"), default="channels_last")
    add("--peer", choices=("authors", "spikingjelly"), help="another implementation in place of this repository's")
    add("--authors-path", type=Path, metavar="DIR", help="clone of Tab-ct/rate-based-backpropagation")
    add("--sj14-path", type=Path, metavar="DIR", help="folder of SpikingJelly 0.0.0.0.14, which the authors use")
    add("--no-compile", dest="compiled", action="store_false", help="run the fused passes as they are written")
    add("--cuda-graphs", action="store_true", help="replay the passes as CUDA graphs, as training on one GPU does")
    add("--grad-checkpointing", action="store_true", help="run each block a second time in the backward pass")
    add("--width", type=int, help="channels of the first stage (default: the paper's)")
    add("--image-size", type=int, default=32, help="pixels a side")
    add("--warmup", type=int, default=3, help="steps before the timed ones")
    add("--steps", type=int, default=10, help="timed steps, at least 2")
    add("--threads", type=int, help="threads (default: PyTorch's choice)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--seed", type=int, default=0)
    group = made.add_argument_group("comparison", "each row in a process of its own; rows that exist are kept")
    add = group.add_argument
    add("--compare", action="store_true", help="measure all rules and peers and write a table")
    add("--precisions", help="of our rows, with commas (default: fp32, and bf16 where the processor or GPU has it)")
    add("--algorithms", help=f"of the rows of speed, with commas, of {','.join(ALGORITHMS)} (default: all)")
    add("--formats", help=f"of the peers' rows of speed, with commas, of {','.join(FORMATS)} (default: both)")
    add("--only", help=f"groups of rows, with commas, of {','.join(GROUPS)} (default: all)")
    add("--repeats", type=int, default=3, help="alternations of the headline rows")
    add("--fresh", action="store_true", help="measure again what the .jsonl file holds")
    add("--timeout", type=float, default=1800, help="seconds after which a row has failed")
    add("--out", type=Path, help="the table (default: benchmarks/results/DATE_training_step.md)")
    return made


def main() -> None:
    arguments = parser().parse_args()
    # as `scripts/` do, and for peers, too; without its package, which would import PyTorch and `models`
    runpy.run_path(str(ROOT / "distill" / "allocator.py"))["keep_memory"]()
    try:
        if arguments.compare:
            from benchmarks.compare import compare

            print(compare(arguments, ROOT), file=sys.stderr)
            return
        with contextlib.redirect_stdout(sys.stderr):  # a library that prints must not add to the one line
            from benchmarks.contestants import Settings
            from benchmarks.measure import measure

            names = {field.name for field in dataclasses.fields(Settings)}
            row = measure(Settings(**{name: value for name, value in vars(arguments).items() if name in names}))
        print(json.dumps(row))
    except (ValueError, OSError) as error:
        if os.environ.get("SPIKESWAP_TRACEBACK"):
            raise
        print(f"training_step.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # Python puts this folder first, but benchmarks, models and distill are in its parent
    main()
