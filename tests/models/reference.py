"""Rate-based backpropagation written a second time, from section 2 of the design alone, as two plain passes.

A spike pass (no graph, time folded into the batch) in which each neuron keeps r and kappa, each batch norm the
statistics of the stream and each max pool the mean of what it pooled; then an ordinary autograd pass of the *same*
module tree on the rates, in which these layers replay what they kept. Nothing here knows of `models`: neurons are found
by their class's name and read by their `config`.

T steps, B images.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Clock:
    """What all layers of one reference network share."""

    timesteps: int
    spiking: bool = True
    """True in the spike pass, on (T*B, ...); False in the rate pass, on (B, ...)."""


class SurrogateSpike(torch.autograd.Function):
    """[x >= 0], with the derivative alpha g (1 - g), g = sigmoid(alpha x)."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        g = torch.sigmoid(ctx.alpha * ctx.saved_tensors[0])
        return grad * ctx.alpha * g * (1 - g), None


def spikes_of(currents: Tensor, leak, threshold, reset, detach_reset, alpha) -> Tensor:
    """(T, ...) currents to (T, ...) spikes, with the graph of backpropagation through time."""
    v, spikes = torch.zeros_like(currents[0]), []
    for c in currents:
        u = leak * v + c
        s = SurrogateSpike.apply(u - threshold, alpha)
        gone = s.detach() if detach_reset else s
        v = u - threshold * gone if reset == "soft" else (1 - gone) * u
        spikes.append(s)
    return torch.stack(spikes)


def rate_and_kappa(currents: Tensor, **neuron) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes (T, ...), r and kappa.

    e_t is du_t/dc for a change dc that is the same at all steps, so kappa is the derivative through time of the rate
    with respect to a constant current: autograd finds it without the recursion for e_t.
    """
    with torch.enable_grad():
        constant = torch.zeros_like(currents[0], requires_grad=True)
        spikes = spikes_of(currents.detach() + constant, **neuron)
        (kappa,) = torch.autograd.grad(spikes.mean(0).sum(), constant)
    return spikes.detach(), spikes.detach().mean(0), kappa


def derivative_by_leak(currents: Tensor, leak, **neuron) -> Tensor:
    """chi: of the rate with respect to a leak, element by element, through time."""
    with torch.enable_grad():
        leaks = torch.full_like(currents[0], float(leak)).requires_grad_()
        rate = spikes_of(currents.detach(), leaks, **neuron).mean(0)
        (chi,) = torch.autograd.grad(rate.sum(), leaks)
    return chi


class _Layer(nn.Module):
    """Keeps what the spike pass found, call by call, for the rate pass."""

    def __init__(self, original: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.kept: deque = deque()
        self.training = original.training

    def forward(self, x: Tensor) -> Tensor:
        return self.spike_pass(x) if self.clock.spiking else self.rate_pass(x, self.kept.popleft())

    def steps(self, folded: Tensor) -> Tensor:
        return folded.unflatten(0, (self.clock.timesteps, -1))


class Neuron(_Layer):
    def __init__(self, original, clock):
        super().__init__(original, clock)
        c = original.config
        self.neuron = dict(threshold=c.threshold, reset=c.reset, detach_reset=c.detach_reset, alpha=c.alpha)
        self.learned = c.learnable_leak
        if self.learned:
            self.w = original.w
        else:
            self.constant_leak = c.leak

    def leak(self):
        return 1 - torch.sigmoid(self.w) if self.learned else self.constant_leak

    def spike_pass(self, x):
        leak = self.leak()
        spikes, rate, kappa = rate_and_kappa(self.steps(x), leak=leak, **self.neuron)
        self.kept.append((rate, kappa, derivative_by_leak(self.steps(x), leak, **self.neuron) if self.learned else 0))
        return spikes.flatten(0, 1)

    def rate_pass(self, c, kept):
        rate, kappa, chi = kept
        value = rate + kappa * (c - c.detach())
        return value + chi * (self.leak() - self.leak().detach()) if self.learned else value


class BatchNorm(_Layer):
    """Statistics of the stream over T*B*H*W; in the rate pass their values with the gradients of ybar's own."""

    def __init__(self, original, clock):
        super().__init__(original, clock)
        self.weight, self.bias = original.weight, original.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(original, name))
        self.momentum, self.eps = original.momentum, original.eps
        self.act = getattr(original, "act", nn.Identity())  # timm's name of it, and of its parameters
        self.behind = nn.Sequential(*([original.drop, self.act] if hasattr(original, "act") else []))
        self.use_batch = original.training or original.running_mean is None

    def spike_pass(self, x):
        if not self.use_batch:
            self.kept.append(None)
            return self.behind(self.affine(x, self.running_mean, self.running_var))
        rows = x.transpose(0, 1).flatten(1)
        mean = rows.mean(1)
        var = (rows - mean[:, None]).square().mean(1)
        if self.running_mean is not None:
            self.num_batches_tracked += 1
            share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            unbiased = var * rows.shape[1] / (rows.shape[1] - 1)
            self.running_mean.copy_((1 - share) * self.running_mean + share * mean)
            self.running_var.copy_((1 - share) * self.running_var + share * unbiased)
        self.kept.append((mean, var))
        return self.behind(self.affine(x, mean, var))

    def rate_pass(self, ybar, kept):
        if kept is None:
            return self.behind(self.affine(ybar, self.running_mean, self.running_var))
        rows = ybar.transpose(0, 1).flatten(1)
        mean = rows.mean(1)
        var = (rows - mean[:, None]).square().mean(1)
        mean, var = (value + own - own.detach() for value, own in zip(kept, (mean, var), strict=True))
        return self.behind(self.affine(ybar, mean, var))

    def affine(self, x, mean, var):
        mean, var, weight, bias = (
            None if v is None else v.view(1, -1, *[1] * (x.ndim - 2)) for v in (mean, var, self.weight, self.bias)
        )
        y = (x - mean) / torch.sqrt(var + self.eps)
        return y if weight is None else y * weight + bias


class StepwiseBatchNorm(BatchNorm):
    """rate_S: statistics of each step; the rate sees mu = mean_t mu_t and sigma^-2 = mean_t 1/(sigma_t^2 + eps)."""

    def spike_pass(self, x):
        if not self.use_batch:
            return super().spike_pass(x)
        steps, means, inverses = [], [], []
        for y in self.steps(x):
            rows = y.transpose(0, 1).flatten(1)
            mean = rows.mean(1)
            var = (rows - mean[:, None]).square().mean(1)
            if self.running_mean is not None:
                self.num_batches_tracked += 1
                share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
                unbiased = var * rows.shape[1] / (rows.shape[1] - 1)
                self.running_mean.copy_((1 - share) * self.running_mean + share * mean)
                self.running_var.copy_((1 - share) * self.running_var + share * unbiased)
            steps.append(self.affine(y, mean, var))
            means.append(mean)
            inverses.append(1 / (var + self.eps))
        self.kept.append((sum(means) / len(means), sum(inverses) / len(inverses)))
        return self.behind(torch.cat(steps))

    def rate_pass(self, ybar, kept):
        if kept is None:
            return super().rate_pass(ybar, kept)
        mu, inverse = kept
        rows = ybar.transpose(0, 1).flatten(1)
        mean = rows.mean(1)
        spread = (rows - mu[:, None]).square().mean(1)  # whose derivative is 2 (ybar - mu) / N
        # the values are those kept, the derivatives those of the statistics of ybar
        mean = mu + mean - mean.detach()
        var = 1 / inverse - self.eps + spread - spread.detach()
        return self.behind(self.affine(ybar, mean, var))


class LinearMap(_Layer):
    """rate_S: a convolution or linear layer whose value is the mean of its T outputs.

    Without a batch norm in front of it that is the map of the mean; behind one that no neuron follows it is not.
    """

    def __init__(self, original, clock):
        super().__init__(original, clock)
        self.map = [original]  # in a list: its parameters keep the names that they have
        self.weight, self.bias = original.weight, original.bias

    def spike_pass(self, x):
        out = self.map[0](x)
        self.kept.append(self.steps(out).mean(0))
        return out

    def rate_pass(self, rate, value):
        out = self.map[0](rate)
        return value + out - out.detach()


class MaxPool(_Layer):
    """The mean of each step's pooled spikes, with the gradient through the argmax of the rate."""

    def __init__(self, original, clock):
        super().__init__(original, clock)
        adaptive = isinstance(original, nn.AdaptiveMaxPool2d)
        self.pool = copy.deepcopy(original)
        self.pool.return_indices = True
        assert adaptive or isinstance(original, nn.MaxPool2d)

    def spike_pass(self, x):
        pooled, _ = self.pool(x)
        self.kept.append(self.steps(pooled).mean(0))
        return pooled

    def rate_pass(self, rate, value):
        _, where = self.pool(rate.detach())
        chosen = rate.flatten(2).gather(2, where.flatten(2)).view_as(value)
        return value + chosen - chosen.detach()


class OneMask(_Layer):
    """Dropout and DropPath: one mask, drawn as the original would for one step."""

    def __init__(self, original, clock):
        super().__init__(original, clock)
        self.original = original

    def spike_pass(self, x):
        mask = self.original(torch.ones_like(self.steps(x)[0]))
        self.kept.append(mask)
        return (self.steps(x) * mask).flatten(0, 1)

    def rate_pass(self, x, mask):
        return x * mask


LAYERS = {
    "SpikingNeuron": Neuron,
    "BatchNorm1d": BatchNorm,
    "BatchNorm2d": BatchNorm,
    "BatchNormAct2d": BatchNorm,
    "MaxPool2d": MaxPool,
    "AdaptiveMaxPool2d": MaxPool,
    "Dropout": OneMask,
    "Dropout2d": OneMask,
    "DropPath": OneMask,
}


STEPWISE = {
    "BatchNorm1d": StepwiseBatchNorm,
    "BatchNorm2d": StepwiseBatchNorm,
    "BatchNormAct2d": StepwiseBatchNorm,
    "Conv2d": LinearMap,
    "Linear": LinearMap,
}
"""What is another layer under rate_S."""


def swap(network: nn.Module, layers: dict, *args) -> nn.Module:
    """Replaces each module, innermost first, whose class's name is in `layers`; parameters are kept as they are."""
    for name, child in network.named_children():
        swap(child, layers, *args)
        if type(child).__name__ in layers:
            setattr(network, name, layers[type(child).__name__](child, *args))
    return network


class Reference:
    """``Reference(network, T)(images)`` gives logits with the graph of rate_M.

    Args:
        network: a plain module on plain tensors with `SpikingNeuron`s in it; copied.
        layers: further replacements, by class name.
    """

    def __init__(self, network: nn.Module, timesteps: int, layers: dict | None = None) -> None:
        self.clock = Clock(timesteps)
        self.network = swap(copy.deepcopy(network), {**LAYERS, **(layers or {})}, self.clock)

    def __call__(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), or frames (T, B, C, H, W)."""
        timesteps = self.clock.timesteps
        frames = images if images.ndim == 5 else images.expand(timesteps, *images.shape)
        self.clock.spiking = True
        with torch.no_grad():
            logits = self.network(frames.flatten(0, 1)).unflatten(0, (timesteps, -1)).mean(0)
        self.clock.spiking = False
        rate = self.network(frames.mean(0))
        torch.testing.assert_close(rate, logits, rtol=1e-10, atol=1e-12)  # the two passes tell of one network
        return rate


class StepwiseReference(Reference):
    """The same for rate_S."""

    def __init__(self, network: nn.Module, timesteps: int) -> None:
        super().__init__(network, timesteps, STEPWISE)


class _Folded(nn.Module):
    """A multi-step SpikingJelly node on time folded into the batch."""

    def __init__(self, original: nn.Module, timesteps: int) -> None:
        super().__init__()
        from spikingjelly.activation_based import neuron, surrogate

        c = original.config
        arguments = dict(
            v_threshold=c.threshold,
            v_reset=None if c.reset == "soft" else 0.0,
            surrogate_function=surrogate.Sigmoid(alpha=c.alpha),
            detach_reset=c.detach_reset,
            step_mode="m",
        )
        if c.learnable_leak:
            node = neuron.ParametricLIFNode(init_tau=1 / (1 - c.leak), decay_input=False, **arguments)
            torch.testing.assert_close(node.w.to(original.w.dtype), original.w, rtol=1e-6, atol=1e-7)
            self.w = node.w = original.w  # the parameter keeps its name
            object.__setattr__(self, "node", node)
        elif c.leak == 1:
            self.node = neuron.IFNode(**arguments)
        else:
            self.node = neuron.LIFNode(tau=1 / (1 - c.leak), decay_input=False, **arguments)
        self.timesteps = timesteps

    def forward(self, x: Tensor) -> Tensor:
        self.node.reset()
        return self.node(x.unflatten(0, (self.timesteps, -1))).flatten(0, 1)


class SpikingJellyNetwork:
    """``SpikingJellyNetwork(network, T)(images)``: SpikingJelly's own nodes, plain autograd through time."""

    def __init__(self, network: nn.Module, timesteps: int) -> None:
        self.timesteps = timesteps
        self.network = swap(copy.deepcopy(network), {"SpikingNeuron": _Folded}, timesteps)
        masks = {name: OneMask for name in ("Dropout", "Dropout2d", "DropPath")}
        swap(self.network, masks, Clock(timesteps))

    def __call__(self, images: Tensor) -> Tensor:
        return self.per_step(images).mean(0)

    def per_step(self, images: Tensor) -> Tensor:
        """(T, B, classes)."""
        frames = images if images.ndim == 5 else images.expand(self.timesteps, *images.shape)
        return self.network(frames.flatten(0, 1)).unflatten(0, (self.timesteps, -1))


def train_each_step(call, network: nn.Module, images: Tensor, timesteps: int) -> Training:
    """Online training: the gradients of T forward and backward passes, summed; the logits of each step.

    Args:
        call: images and step to that step's logits. network: where parameters and buffers are read.
    """
    images = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    network.zero_grad(set_to_none=True)
    steps = []
    for t in range(timesteps):
        logits = call(images, t)
        weights = torch.linspace(-1, 2 + t, logits.numel(), dtype=logits.dtype).view_as(logits)
        (logits * weights + 0.3 * F.softmax(logits, 1) * weights.flip(0)).sum().backward()
        steps.append(logits.detach())
    gradients = {name: p.grad for name, p in network.named_parameters()} | {"images": images.grad}
    return Training(torch.stack(steps), gradients, {name: b.clone() for name, b in network.named_buffers()})


@dataclass
class Training:
    """What one training step of one image batch leaves."""

    logits: Tensor
    gradients: dict[str, Tensor]
    """By parameter name, and "images"."""
    buffers: dict[str, Tensor]


def train_once(call, network: nn.Module, images: Tensor, seed: int = 1) -> Training:
    """Forward, backward of a fixed random weighting of the logits.

    Args:
        call: images to logits. network: where parameters and buffers are read.
    """
    images = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    network.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    logits = call(images)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights + 0.3 * F.softmax(logits, 1) * weights.flip(0)).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()} | {"images": images.grad}
    return Training(logits.detach(), gradients, {name: b.clone() for name, b in network.named_buffers()})


def assert_same_training(ours: Training, theirs: Training, tolerance: float = 1e-10) -> None:
    """Logits, all gradients and buffers, each to `tolerance` of its own norm.

    A gradient that is nought but for rounding (of a bias in front of a batch norm) is held to the largest one's scale.
    """
    assert_close(ours.logits, theirs.logits, tolerance, "logits")
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert None not in theirs.gradients.values()
    scale = max(gradient.norm() for gradient in theirs.gradients.values())
    vanishing = [name for name, gradient in theirs.gradients.items() if gradient.norm() < 1e-6 * scale]
    assert all(name.endswith("bias") for name in vanishing), f"no gradient at {vanishing}: the test says nothing"
    for name, gradient in theirs.gradients.items():
        assert ours.gradients[name] is not None, f"{name} has a gradient in the reference and none in ours"
        assert_close(ours.gradients[name], gradient, tolerance, f"gradient of {name}", floor=1e-3 * scale)
    assert ours.buffers.keys() == theirs.buffers.keys()
    for name, buffer in theirs.buffers.items():
        assert_close(ours.buffers[name].double(), buffer.double(), tolerance, name)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float, what: str, floor: float = 1e-30) -> None:
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    error = (ours - theirs).norm() / theirs.norm().clamp_min(floor)
    assert error <= tolerance, f"{what} is off by {error:.2e} of its norm"
