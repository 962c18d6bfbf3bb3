"""Which way a layer fires: one loop, one pass, or pieces of its rows."""

import pytest
import torch

from models import NeuronConfig, compile_kernels, firing, firing_passes


@pytest.fixture(autouse=True)
def _uncompiled_again():
    yield
    compile_kernels(False)


@pytest.mark.parametrize(
    ("timesteps", "neuron", "leak", "way"),
    [
        (4, NeuronConfig(), 0.2, "_fire_in_one_loop"),
        (4, NeuronConfig(reset="hard"), 0.2, "_fire_in_one_loop"),
        (5, NeuronConfig(), 0.2, "_fire_whole"),
        (5, NeuronConfig(reset="hard"), 0.2, "_fire_in_pieces"),
        (5, NeuronConfig(detach_reset=False), 0.2, "_fire_in_pieces"),
        (5, NeuronConfig(learnable_leak=True), torch.tensor(0.2), "_fire_in_pieces"),
    ],
)
def test_few_steps_are_fired_in_one_loop_and_many_in_pieces_where_a_membrane_is_used_often(
    timesteps, neuron, leak, way, monkeypatch
):
    ways = []
    for name in ("_fire_in_one_loop", "_fire_in_pieces", "_fire_whole"):

        def written(*arguments, name=name):
            ways.append(name)
            return firing_passes._as_written(*arguments)

        monkeypatch.setattr(firing_passes, name, written)
    current = torch.randn(timesteps * 2, 3)
    firing.fire_with_rate([current], [None], [timesteps], timesteps, neuron, leak)
    compile_kernels(True)
    firing.fire_with_rate([current], [None], [timesteps], timesteps, neuron, leak)
    assert ways == ["_fire_whole", way]


def test_a_layer_is_fired_in_pieces_with_a_smaller_last_one(monkeypatch):
    cut = []
    written = firing_passes._as_written

    def into(streams, maps, timesteps, neuron, leak, averaged, places):
        cut.append(streams[0].shape[1])
        found = [x for x in written(streams, maps, 3, neuron, leak, averaged) if x is not None]
        for place, value in zip(places, found, strict=True):
            place.copy_(value)

    monkeypatch.setattr(firing_passes, "_fire_into", into)
    monkeypatch.setattr(firing_passes, "PIECE", 100)
    streams = [torch.randn(3, 31, 8, dtype=torch.float64), torch.randn(1, 31, 8, dtype=torch.float64)]
    config, maps = NeuronConfig(leak=0.5), [None, None]
    found = firing_passes._fire_in_pieces(streams, maps, 3, config, torch.tensor(0.5, dtype=torch.float64), [0])
    assert cut == [12, 12, 7]
    expected = written(streams, maps, 3, config, torch.tensor(0.5, dtype=torch.float64), [0])
    assert len(found) == 7 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    empty = firing_passes._fire_in_pieces([x[:, :0] for x in streams], maps, 3, config, 0.5, [])
    assert empty[0].shape == (3, 0, 8)
