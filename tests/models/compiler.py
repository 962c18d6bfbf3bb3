"""Whether it is the machine that has no compiler, or our kernels that it does not compile."""

import pytest
import torch

MESSAGE = "torch.compile failed"
"""Of `models.compiling`."""


def skip_without_compiler(caplog):
    """Skips a test whose kernels ran as written because nothing compiles here; any other cause is a failure."""
    failed = [record.getMessage() for record in caplog.records if MESSAGE in record.getMessage()]
    if not failed:
        return
    try:
        torch.compile(lambda x: 2 * x)(torch.ones(3))
    except Exception:  # its many backends raise what they like
        pytest.skip("no compiler on this machine")
    pytest.fail(f"there is a compiler, but: {failed[0]}")
