"""Small feedback loops in float64, and their equilibrium by plain PyTorch: nothing of `models.feedback` is in it."""

import torch
import torch.nn.functional as F
from torch import nn

from models import NeuronConfig, SpikeTrain, SpikingNeuron
from models.feedback import AverageNorm, Current, FeedbackConfig, FeedbackLoop

IF = NeuronConfig(leak=1.0, threshold=2.0)
LIF = NeuronConfig(leak=0.8, threshold=2.0)
GAIN = 0.5
"""Of the maps around the loop: small enough to contract, large enough to be seen."""


def toy_loop(layers=2, neuron=IF, algorithm="ide", gain=GAIN, batch_norm=False, **config):
    """Layers of 8 channels on maps of 8x8, 4x4 from the second on; images are (B, 3, 8, 8)."""
    settings = {"dropout": 0.0, "tolerance": 1e-13, "max_iterations": 400, "head_start": 0.0, "bound": 100.0}
    config = FeedbackConfig(batch_norm=batch_norm, **(settings | config)).resolved(algorithm)

    def current(conv):
        return Current(conv, AverageNorm(8, neuron.leak) if batch_norm else None, config.dropout)

    maps = [current(nn.Conv2d(8, 8, 3, stride=2 if i == 0 else 1, padding=1)) for i in range(layers - 1)]
    back = nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, bias=False) if maps else nn.Conv2d(8, 8, 3, padding=1, bias=False)
    feedback = Current(back, None, config.dropout)
    loop = FeedbackLoop(
        current(nn.Conv2d(3, 8, 3, padding=1)), maps, feedback, lambda: SpikingNeuron(neuron), config
    ).double()
    loop.algorithm = algorithm
    with torch.no_grad():
        for current in (*loop.maps, feedback):
            current.linear.weight.normal_(0, gain * 2 / (8 * 9) ** 0.5)
        for current in (loop.input_map, *loop.maps):
            nn.init.uniform_(current.linear.bias, -0.6, 2.2)  # some channels fire at no step, some at each
        for module in loop.modules():
            if isinstance(module, AverageNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.uniform_(module.bias, -0.6, 2.2)
    return loop.train()


def images(batch=2):
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


def rate(loop, x, timesteps=4):
    """The average of the last layer, with the graph of training; `x` is constant, or has a frame for each step."""
    train = SpikeTrain.constant(x, timesteps, "rate") if x.ndim == 4 else SpikeTrain.from_stream(x, "rate")
    return loop(train).rate


def turn(loop, last, x):
    """One application of the loop, a_1 to a_n, from the average of the last layer.

    Norms go by their running statistics, dropout by the masks that are set.
    """
    theta, back = loop.threshold, loop.feedback.linear
    if isinstance(back, nn.ConvTranspose2d):
        fed = F.conv_transpose2d(last, back.weight, None, back.stride, back.padding, back.output_padding)
    else:
        fed = F.conv2d(last, back.weight, None, back.stride, back.padding)
    averages = [((_affine(loop.input_map, x) + _dropped(loop.feedback, fed)) / theta).clamp(0, 1)]
    for current in loop.maps:
        averages.append((_affine(current, averages[-1]) / theta).clamp(0, 1))
    return averages


def equilibrium(loop, x, turns=200):
    """a_1 to a_n where they have settled, with the graph of all turns."""
    averages = [torch.zeros(1)]
    side = 4 if len(loop.maps) else 8
    last = x.new_zeros(len(x), 8, side, side)
    for _ in range(turns):
        averages = turn(loop, last, x)
        last = averages[-1]
    return averages


def at_equilibrium(loop, x, monkeypatch):
    """Lets the loop measure the exact averages, which it would after infinitely many steps."""
    with torch.no_grad():
        averages = [average.clone() for average in equilibrium(loop, x)]
    monkeypatch.setattr(loop, "_averages", lambda currents: averages)
    inner = [float(((a > 0) & (a < 1)).double().mean()) for a in averages]
    assert all(0.2 < share < 0.999 for share in inner), f"masks that hide nothing, or all, test nothing: {inner}"
    return averages


def _affine(current, x):
    conv, norm = current.linear, current.norm
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
    if norm is not None:
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return _dropped(current, y)


def _dropped(current, y):
    return y if current.drop.mask is None else y * current.drop.mask
