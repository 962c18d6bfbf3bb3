"""A feedback loop of spiking layers, as one module from spike train to spike train.

    layer 1: W_x x + F s_n of the step before        layer i: W_i s_{i-1}

Average firing rates settle at the equilibrium a_1 = clip((F a_n + W_x xbar + b) / theta, 0, 1),
a_{i+1} = clip((W_i a_i + b_i) / theta, 0, 1) (Xiao et al., NeurIPS 2021, arXiv 2109.14247, theorems 1 and 2).

The input is given its current for all steps at once; the loop runs step by step. In training (a pass of kind "rate")
it runs without a graph, keeps the averages alone, and the gradient is that of the equilibrium: by "ide" from a solver,
by "spide" from backward spikes. Neither depends on the number of steps in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from spikingjelly.activation_based.base import MemoryModule
from torch import Tensor, nn

from models.feedback.averages import Readout, RunningAverage, average_over_steps
from models.feedback.bound import keep_below
from models.feedback.config import FEEDBACK_ALGORITHMS, FeedbackConfig
from models.feedback.implicit import AtAverage, AtEquilibrium
from models.feedback.linearised import LinearisedLoop
from models.feedback.maps import Current, PassDropout
from models.feedback.solvers import NonContractingLoopError, SolverReport, broyden, fixed_point, report_of
from models.feedback.spiking_solver import spiking_couples
from models.linear_rate import WithValue
from models.neuron import SpikingNeuron
from models.ranks import largest_over_ranks
from models.spiketrain import SpikeTrain, UnsupportedOperationError
from models.tape import Tape

log = logging.getLogger(__name__)

WEAKENED = 0.9
"""What a loop that does not contract should multiply by after its feedback was weakened."""

SOLVERS = {"fixed_point": fixed_point, "broyden": broyden}


class LoopState:
    """What a loop keeps from one step to the next besides its neurons' membranes; nothing before the first step."""

    def __init__(self) -> None:
        self.spikes: SpikeTrain | Tensor | None = None
        """Of the last layer."""
        self.readout: Readout | None = None


class FeedbackLoop(MemoryModule):
    """Takes a `SpikeTrain` (B, C_in, ...), or plain tensors as SpikingJelly's nodes do; gives the last layer's spikes.

    For neurons with a leak what it gives are not spikes but numbers whose plain mean is the weighted average of spikes
    (`models.feedback.averages`).

    Args:
        input_map: W_x, with norm and dropout.
        maps: W_1 to W_{n-1}, from layer to layer.
        feedback: F, without a norm.
        neuron: makes a layer of neurons.
        config: resolved for an algorithm.

    Attributes:
        algorithm: of the backward pass, one of `FEEDBACK_ALGORITHMS`.
        solver_report: how the last backward pass went; None before the first.
        backward_rates: share of the neurons of layers 1 to n that fired in a step of spide's last backward pass, (n,);
            None before it.
    """

    state: LoopState | None
    """Of the last step on plain tensors."""
    excess: Tensor
    """The growth that the last backward pass found, where it was 1 or more; a buffer, so that training can go on.

    Of several processes each has its own until the next training pass, or until `share_excess` is called to save it.
    """

    def __init__(
        self,
        input_map: Current,
        maps: Sequence[Current],
        feedback: Current,
        neuron: Callable[[], nn.Module],
        config: FeedbackConfig,
    ) -> None:
        super().__init__()
        self.input_map = input_map
        self.maps = nn.ModuleList(maps)
        self.feedback = feedback
        self.neurons = nn.ModuleList(neuron() for _ in range(1 + len(maps)))
        self.config = config
        self.algorithm = FEEDBACK_ALGORITHMS[0]
        self.solver_report: SolverReport | None = None
        self.backward_rates: Tensor | None = None
        self.register_buffer("excess", torch.zeros(()))
        self._failures = 0
        self._said: set[str] = set()
        self._has_news = False
        self.register_memory("state", None)
        self.leak, self.threshold = _constants(self.neurons)
        self._keep_below_bound()

    def forward(self, x: SpikeTrain | Tensor) -> SpikeTrain | Tensor:
        if not isinstance(x, SpikeTrain):
            return super().forward(x)
        if x.kind not in ("plain", "plain_step", "rate"):
            raise UnsupportedOperationError(
                f"no rule for a feedback loop in a pass of kind {x.kind!r}: it trains with one of {FEEDBACK_ALGORITHMS}"
            )
        return getattr(self, f"_{x.kind}_pass")(x)

    # -- the steps --------------------------------------------------------------------------------

    def single_step_forward(self, x: Tensor) -> Tensor:
        """One step on a plain tensor (B, C_in, ...)."""
        self.state = self.state or LoopState()
        return self._read(self.state, self._step(self.input_map(x), self.state)[-1])

    def _step(self, current, state: LoopState) -> list:
        """The spikes of layers 1 to n at one step, and the state that they leave.

        Args:
            current: W_x x of this step, (B, C_1, ...), a tensor or a train of one step.
        """
        offset = self.config.head_start * self.threshold  # type: ignore[operator]
        if state.spikes is not None:
            current = current + self.feedback(state.spikes)
            offset = (1 - self.leak) * offset
        spikes = [self.neurons[0](current + offset if offset else current)]
        for layer, neuron in zip(self.maps, self.neurons[1:], strict=True):
            current = layer(spikes[-1])
            spikes.append(neuron(current + offset if offset else current))
        state.spikes = spikes[-1]
        return spikes

    def _read(self, state: LoopState, spikes: Tensor) -> Tensor:
        state.readout = state.readout or Readout(self.leak)
        return state.readout.next(spikes)

    def _plain_step_pass(self, x: SpikeTrain) -> SpikeTrain:
        assert x.tape is not None
        state = x.tape.record(LoopState)
        spikes = self._step(self.input_map(x), state)[-1]
        return x.derive(self._read(state, spikes.folded), 1)

    def _plain_pass(self, x: SpikeTrain) -> SpikeTrain:
        state = LoopState()
        steps = [self._read(state, spikes[-1].folded) for spikes in self._simulated(self.input_map(x), state)]
        return x.derive(torch.cat(steps), x.timesteps)

    @torch.no_grad()
    def _simulated(self, currents: SpikeTrain, state: LoopState) -> Iterator[list[SpikeTrain]]:
        """The spikes of all layers at each step, trains of one step, without a graph."""
        folded, tape = currents.folded, Tape(timesteps=1)
        for t in range(currents.timesteps):
            now = folded if currents.steps == 1 else currents.stream[t]
            tape.rewind()
            yield self._step(SpikeTrain.constant(now, 1, "plain_step", tape), state)

    # -- training ---------------------------------------------------------------------------------

    def _rate_pass(self, x: SpikeTrain) -> SpikeTrain:
        self._keep_contracting()
        self._forget_masks()
        try:
            currents = self.input_map(x)
            averages = self._averages(currents)
            loop = LinearisedLoop(self.feedback, self.maps, averages, self.threshold)  # type: ignore[arg-type]
            rate = self._with_graph(currents, averages, loop)
        finally:
            self._forget_masks()
        return x.derive(rate.detach(), 1, rate=rate)

    def _averages(self, currents: SpikeTrain) -> list[Tensor]:
        """a_1 to a_n of T steps, at least in float32."""
        averages = [RunningAverage(self.leak) for _ in self.neurons]
        for spikes in self._simulated(currents, LoopState()):
            for average, layer in zip(averages, spikes, strict=True):
                average.add(layer.folded)
        # before PyTorch 2.11 autocast would give the pass with a graph the weights that it has cast here without one
        torch.clear_autocast_cache()
        return [average.value for average in averages]

    def _with_graph(self, currents: SpikeTrain, averages: list[Tensor], loop: LinearisedLoop) -> Tensor:
        """One application of each layer at the averages, and behind them the gradient at the equilibrium."""
        current = WithValue.apply(currents.rate, average_over_steps(currents.folded, currents.steps, self.leak))
        applied = [AtAverage.apply(current + self.feedback(averages[-1]), averages[0], self.threshold)]
        for layer, before, average in zip(self.maps, averages[:-1], averages[1:], strict=True):
            applied.append(AtAverage.apply(layer(before), average, self.threshold))
        return AtEquilibrium.apply(lambda grad: self._solved(loop, grad), *applied)

    def _solved(self, loop: LinearisedLoop, grad: Tensor) -> list[Tensor]:
        """The gradients of a_1 to a_n at the equilibrium, from that of the last.

        Raises:
            NonContractingLoopError: see `_without_feedback`.
        """
        config = self.config
        if self.algorithm == "spide":
            betas = self._by_spikes(loop, grad)
            report = report_of(loop.turn, grad, betas[-1], config.backward_timesteps)
        else:
            beta, report = SOLVERS[config.solver](loop.turn, grad, config.tolerance, config.max_iterations)
            betas = loop.gradients(beta)
        self.solver_report, self._has_news = report, True
        if report.growth >= 1:
            return self._without_feedback(loop, grad, report)
        self._failures = 0
        if not report.converged:
            self._say_once(
                "the gradient of the feedback loop is not solved: after %d iterations %.3g of its norm is left",
                *(report.iterations, report.residual),
            )
        return betas

    def _by_spikes(self, loop: LinearisedLoop, grad: Tensor, around: bool = True) -> list[Tensor]:
        config = self.config
        scale = config.gradient_scale * len(grad)  # a loss that is a mean gives each image a share of the gradient
        betas, self.backward_rates = spiking_couples(
            loop, grad, config.backward_timesteps, config.backward_threshold, scale, around
        )
        return betas

    def _without_feedback(self, loop: LinearisedLoop, grad: Tensor, report: SolverReport) -> list[Tensor]:
        """What is left where the loop does not contract: the gradient without what goes around.

        The feedback is weakened before the next training pass by as much as the loop grows, in which its gain is
        linear.

        Raises:
            NonContractingLoopError: if that has not helped for too long.
        """
        self._failures += 1
        self.excess.fill_(report.growth)
        found = f"the feedback loop does not contract: a turn multiplies the gradient by {report.growth:.3g}"
        if self._failures >= self.config.patience:
            raise NonContractingLoopError(
                f"{found}, in {self._failures} backward passes in a row. Lower the feedback's bound (now "
                f"{self.config.bound}) or the learning rate"
            )
        self._say_once("%s; this batch trains without it, and the feedback is weakened", found)
        return self._by_spikes(loop, grad, around=False) if self.algorithm == "spide" else loop.gradients(grad)

    def _say_once(self, message: str, *args: object) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning(message + " (said once)", *args)

    def _keep_below_bound(self) -> Tensor:
        """The weight of the feedback, no larger than it may be."""
        weight: Tensor = self.feedback.linear.weight  # type: ignore[assignment]
        keep_below(weight, self.config.bounded_norm, self.config.bound)  # type: ignore[arg-type]
        return weight

    @torch.no_grad()
    def _keep_contracting(self) -> None:
        """Before a training pass: weakens the feedback where the last backward pass found the loop growing."""
        weight = self._keep_below_bound()
        self.share_excess()
        excess = float(self.excess)
        if excess >= 1:
            weight.mul_(WEAKENED / excess)
        self.excess.zero_()

    @torch.no_grad()
    def share_excess(self) -> None:
        """The largest growth that any process has found counts on all; every process calls it."""
        largest_over_ranks(self.excess)

    def take_backward_figures(self) -> dict[str, Tensor]:
        """What is worth logging of the last backward pass, scalars by name; asked again before the next, nothing.

        iterations, residual, converged (0 or 1) and growth of the solver's report; of spide for each layer of neurons
        firing_rate/NAME, the share of its neurons that fired in a backward step.
        """
        report = self.solver_report
        if report is None or not self._has_news:
            return {}
        self._has_news = False
        names = ("iterations", "residual", "converged", "growth")
        found = {name: torch.tensor(float(getattr(report, name))) for name in names}
        rates = () if self.algorithm != "spide" or self.backward_rates is None else self.backward_rates
        return found | {f"firing_rate/neurons.{number}": rate for number, rate in enumerate(rates)}

    def _forget_masks(self) -> None:
        for module in self.modules():
            if isinstance(module, PassDropout):
                module.reset()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self.config).items())


def _constants(neurons: Iterable[nn.Module]) -> tuple[float, float]:
    """Leak and threshold of the neurons.

    Raises:
        ValueError: for neurons whose averages do not obey the equations of an equilibrium.
    """
    found = []
    for neuron in neurons:
        if not isinstance(neuron, SpikingNeuron):
            raise ValueError(f"a feedback loop takes neurons of models.SpikingNeuron, found {type(neuron).__name__}")
        if neuron.config.reset != "soft" or neuron.config.learnable_leak:
            raise ValueError(
                "a feedback loop takes neurons of reset soft and a fixed leak, whose averages have an equilibrium; "
                f"found {neuron.config}"
            )
        found.append((neuron.config.leak, neuron.config.threshold))
    return found[0]
