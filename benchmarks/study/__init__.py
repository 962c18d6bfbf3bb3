"""The study: what block-wise hybrid replacement is worth, row by row (`python -m benchmarks.study --help`)."""
