"""A feedback network is written as snn; every other format says why it cannot be."""

import pytest
import torch
from export_toys import images, job
from test_feedback_runs import STUDENT

from distill.export import FORMATS
from models import NeuronConfig, UnsupportedOperationError, create_snn, load_snn


def network(algorithm):
    loop, leak = STUDENT["feedback"], NeuronConfig(leak=0.9, threshold=0.5)
    return create_snn("feedback_convnet", 10, 3, 1, leak, algorithm, width=8, feedback=loop).eval()


@pytest.mark.parametrize("format", sorted(FORMATS.keys() - {"snn"}))
def test_a_loop_is_refused_by_name(format, tmp_path):
    pytest.importorskip({"spikingjelly": "spikingjelly", "torch_export": "torch"}.get(format, format))
    with pytest.raises(UnsupportedOperationError, match=r"feedback loop 'loop'.*no format but snn holds it"):
        FORMATS[format](job(network("ide"), images(100), tmp_path, format))
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ["ide", "spide"])
def test_as_snn_it_is_itself(algorithm, tmp_path):
    snn = network(algorithm)
    assert FORMATS["snn"](job(snn, images(100), tmp_path, "snn")).passed
    torch.testing.assert_close(load_snn(tmp_path)(images(4)), snn(images(4)), rtol=0, atol=0)
