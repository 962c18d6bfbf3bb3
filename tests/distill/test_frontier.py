"""The rows of accuracy against energy, over the stages of a run."""

import pytest
from toy_runs import start, tiny

from distill.frontier import RowsOfStages


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("is_main", [True, False])
def test_every_process_opens_the_runs_folder_not_the_main_one_alone(tmp_path, kept, is_main):
    """To open it is to wait for the main process, in the first place that asks for it."""
    session = start(tiny(tmp_path / "r"))
    session.accelerator = type("Accelerator", (), {"is_main_process": is_main})
    opened = []
    session._open = lambda: opened.append(is_main) or type("Folder", (), {"checkpoints": tmp_path})
    RowsOfStages(session, kept)
    assert opened == [is_main]
