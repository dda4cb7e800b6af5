"""Which strategy a request takes: from bandwidth measured, through change points, to a choice.

No threads, network or files. `ChangePoints` says when a sequence has begun to behave differently
(Bayesian online change-point detection); `Chooser` turns bandwidths into a strategy of a table;
`Adapter` reads bandwidths off decisions, and picks the strategy of each request.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agent.protocol.adaptation import CostTable, configuration_map, reward
from agent.protocol.errors import ManifestError
from agent.protocol.messages import Decision
from agent.protocol.plan import Plan

Reals = NDArray[np.float64]

LOWEST_BITS_PER_S = 1e3
"""Below this a link counts as this slow: its logarithm has to exist."""


@dataclass(frozen=True)
class Prior:
    """What is believed of a new run before its first value: a Normal-Gamma distribution.

    Attributes:
        mean: Where values lie.
        weight: How many values that belief is worth.
        shape: Half of the degrees of freedom of their precision.
        scale: Of the precision; the typical variance is scale / shape.
    """

    mean: float = 0.0
    weight: float = 0.1
    shape: float = 1.0
    scale: float = 0.1


class ChangePoints:
    """Where a sequence changes (Adams & MacKay 2007), a value at a time, in bounded memory.

    Values of a run are normal with unknown mean and variance. With pi_r the Student-t density that
    a run of r values predicts and H = 1/expected_run:

        P(r+1) = P(r) pi_r (1 - H),    P(0) = sum_r P(r) pi_r H

    Runs as long as `longest_run` or longer are one hypothesis, which forgets what is older.

    Args:
        expected_run: Mean number of values between changes, > 1.
        longest_run: Run lengths told apart.
        prior: Of every run.
    """

    def __init__(
        self, *, expected_run: float = 150.0, longest_run: int = 256, prior: Prior | None = None
    ) -> None:
        prior = prior or Prior()
        if not (expected_run > 1 and longest_run >= 2):
            raise ValueError("a run is expected to last longer than one value, and at most to be 2")
        runs = np.arange(longest_run + 1, dtype=np.float64)
        self._hazard = 1.0 / expected_run
        self._weight = prior.weight + runs
        self._shape = prior.shape + runs / 2
        log_gammas = [math.lgamma(a + 0.5) - math.lgamma(a) for a in self._shape]
        self._constant = np.array(log_gammas) - 0.5 * math.log(math.pi)
        self._spread = 2.0 * (self._weight + 1.0) / self._weight
        self._forget = self._shape[-1] / (self._shape[-1] + 0.5)
        self._prior = prior
        self._mean = np.full(longest_run + 1, prior.mean)
        self._scale = np.full(longest_run + 1, prior.scale)
        self._mass = np.zeros(longest_run + 1)
        self._mass[0] = 1.0
        self._run = 0

    @property
    def run_length(self) -> int:
        """Values in the likeliest current run, up to `longest_run`."""
        return self._run

    @property
    def mean(self) -> float:
        """Mean of the likeliest current run, the prior's part in it included."""
        return float(self._mean[self._run])

    @property
    def run_lengths(self) -> Reals:
        """(longest_run + 1,) float64: how probable each run length is."""
        return self._mass.copy()

    def update(self, value: float) -> bool:
        """Take one value.

        Returns:
            Whether the run changed: the likeliest run length has dropped.

        Raises:
            ValueError: the value is not finite.
        """
        if not math.isfinite(value):
            raise ValueError(f"cannot take {value}")
        off = value - self._mean
        squared = off * off
        width = self._spread * self._scale
        density = self._constant - 0.5 * np.log(width)
        density -= (self._shape + 0.5) * np.log1p(squared / width)
        mass = self._mass
        live = mass > 0.0
        density -= density[live].max()
        grown = mass * np.exp(np.where(live, density, 0.0))
        total = grown.sum()

        after = np.empty_like(mass)
        after[1:] = grown[:-1]
        after[-1] += grown[-1]
        after[1:] *= 1.0 - self._hazard
        after[0] = total * self._hazard
        after /= total
        after[after < 1e-12] = 0.0  # far below what could ever be the likeliest; no denormals

        gain = self._weight + 1.0
        mean = self._mean + off / gain
        scale = self._scale + squared * (self._weight / (2.0 * gain))
        keeps_oldest = grown[-1] >= grown[-2]
        oldest = (mean[-1], scale[-1] * self._forget) if keeps_oldest else (mean[-2], scale[-2])
        self._mean[1:], self._scale[1:] = mean[:-1], scale[:-1]
        self._mean[0], self._scale[0] = self._prior.mean, self._prior.scale
        self._mean[-1], self._scale[-1] = oldest
        self._mass = after

        before, self._run = self._run, int(after.argmax())
        return self._run < before

    def predict(self, values: NDArray[np.float64]) -> Reals:
        """How likely each value is to come next: the mixture over all run lengths.

        Args:
            values: (V,) float64.

        Returns:
            (V,) float64 densities.
        """
        likely = np.flatnonzero(self._mass > 1e-3)
        width = (self._spread * self._scale)[likely, None]
        density = self._constant[likely, None] - 0.5 * np.log(width)
        off = values - self._mean[likely, None]
        density = density - (self._shape[likely, None] + 0.5) * np.log1p(off * off / width)
        return np.asarray(self._mass[likely] @ np.exp(density))


def bandwidth_states(lowest: float, highest: float, count: int) -> Reals:
    """(count,) bits/s from lowest to highest, evenly spaced in their logarithm."""
    return np.geomspace(max(lowest, LOWEST_BITS_PER_S), highest, count)


class Chooser:
    """Picks a strategy for the bandwidth as it is (Edgent, Algorithm 3).

    `by="state"` is the paper's: the configuration map's entry of the state that is nearest to the
    mean of the current run. `by="expected"` takes the strategy whose reward is highest on average
    over the bandwidths that may come next, so that a link that sometimes fails counts as one.
    Bandwidths are compared by their logarithm.

    Args:
        table: The strategies.
        limit_ms: The latency required.
        states: (B,) ascending bits/s, B >= 2.
        by: `state` or `expected`.
        expected_run: Measurements between changes of the link.
        at_first_bits_per_s: Believed before anything is measured; the middle state if not given.

    Attributes:
        choice: Position in the table of the strategy for the next request.
        map: (B,) the configuration map: the best strategy in each state.
    """

    def __init__(
        self,
        table: CostTable,
        limit_ms: float,
        states: NDArray[np.float64] | Sequence[float],
        *,
        by: Literal["state", "expected"] = "expected",
        expected_run: float = 30.0,
        at_first_bits_per_s: float | None = None,
    ) -> None:
        self.states = np.asarray(states, np.float64)
        if self.states.ndim != 1 or len(self.states) < 2 or (np.diff(self.states) <= 0).any():
            raise ValueError("bandwidth states must be at least two, ascending")
        self.map = configuration_map(table, self.states, limit_ms)
        self._logs = np.log10(np.maximum(self.states, LOWEST_BITS_PER_S))
        # What may come next reaches down to no link at all, whatever the states.
        self._ahead = np.linspace(_log(0.0), self._logs[-1], 2 * len(self.states))
        self._rewards = table.rewards(10.0**self._ahead, limit_ms)
        self._by = by
        self._table = table
        first = self.states[len(self.states) // 2]
        first = _log(first if at_first_bits_per_s is None else at_first_bits_per_s)
        self._changes = ChangePoints(expected_run=expected_run, prior=Prior(mean=first))
        self.choice = int(self.map[self._nearest(first)])

    @property
    def bits_per_s(self) -> float:
        """The bandwidth as it seems to be: the mean, by logarithm, of the current run."""
        return float(10.0**self._changes.mean)

    def observe(self, bits_per_s: float) -> bool:
        """Take a measured bandwidth.

        Args:
            bits_per_s: >= 0.

        Returns:
            Whether the choice changed.
        """
        self._changes.update(_log(bits_per_s))
        before, self.choice = self.choice, self._best()
        return self.choice != before

    def among(self, allowed: Sequence[int]) -> int:
        """The choice where only some strategies can run.

        Args:
            allowed: Positions in the table, at least one.
        """
        if self.choice in allowed:
            return self.choice
        worth = self._changes.predict(self._ahead) @ self._rewards
        latency = self._table.latency_ms(self.bits_per_s)
        return min(allowed, key=lambda i: (-worth[i], latency[i]))

    def _best(self) -> int:
        nearest = int(self.map[self._nearest(self._changes.mean)])
        if self._by == "state":
            return nearest
        worth = self._changes.predict(self._ahead) @ self._rewards
        return int(worth.argmax()) if worth.max() > 0 else nearest

    def _nearest(self, log_bits_per_s: float) -> int:
        return int(np.abs(self._logs - log_bits_per_s).argmin())


PROBE_BYTES = 1000
"""A probe sends at least so much, if any strategy does: less would measure the latency alone."""
PROBE_EVERY_S = 5.0
"""How long a bandwidth that nothing measures is believed."""
STATES = 64
PATIENCE = 0.8
"""Of the latency required: the rest is for what no profile knows, such as a busy device."""
SPARE = 1.1
"""A strategy that sends is in time if it were with so much more to send and to wait for."""


class Adapter:
    """Picks the strategy of each request by what the decisions before it have measured.

    Args:
        plan: With an adaptation.
        clock: Seconds that never go back.

    Raises:
        ManifestError: the plan has none.
    """

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic) -> None:
        adaptation = plan.adaptation
        if adaptation is None:
            raise ManifestError("this plan has nothing to pick a strategy by")
        self.limit_ms = adaptation.limit_ms
        self._clock = clock
        self._link_ms = adaptation.link_ms
        self._table = CostTable.of(adaptation)
        self._devices = [
            frozenset(node.device for node in strategy.nodes) for strategy in plan.strategies
        ]
        # Where an early exit may answer, waiting for it would count as sending.
        self._whole = [len(strategy.exits) == 1 for strategy in plan.strategies]
        self._aim = adaptation.aim
        self._highest_bits_per_s = 2 * adaptation.highest_bits_per_s
        states = bandwidth_states(
            adaptation.lowest_bits_per_s, adaptation.highest_bits_per_s, STATES
        )
        self._chooser = Chooser(self._table, self.limit_ms, states)
        self._measured_s = clock()

    @property
    def bits_per_s(self) -> float:
        """The bandwidth as it seems to be."""
        return self._chooser.bits_per_s

    def pick(self, gone: Container[str] = (), limit_ms: float | None = None) -> int:
        """The strategy of the next request.

        Args:
            gone: Devices that are known not to be there. Where every strategy needs one of them,
                they are taken to be there.
            limit_ms: The latency required of this request, if it is shorter than the plan's.
        """
        there = [i for i, names in enumerate(self._devices) if not any(x in gone for x in names)]
        there = there or list(range(len(self._devices)))
        if limit_ms is None or limit_ms >= self.limit_ms:
            limit_ms = self.limit_ms
            if self._aim == "reward":
                return self._chooser.among(there)
        table = self._table
        latency = table.latency_ms(self.bits_per_s)
        compute = table.compute_ms
        latency = np.where(table.sent_bits > 0, compute + SPARE * (latency - compute), latency)
        in_time = [i for i in there if latency[i] <= limit_ms]
        if not in_time:
            return min(there, key=lambda i: float(latency[i]))
        if self._aim == "reward":
            worth = reward(table.accuracy, latency, limit_ms)
            return max(in_time, key=lambda i: float(worth[i]))
        return max(in_time, key=lambda i: (float(table.accuracy[i]), -float(latency[i])))

    def alone(self, strategy: int, deadline_ms: float) -> tuple[int, float] | None:
        """What to ask for instead of a strategy that stays silent, and when.

        It is the most accurate strategy in which nothing is sent and which takes at most half of
        the time; else the fastest such. It is not asked for before the first should have answered:
        where the time is too short for both, a link that has stopped makes one request late, and
        is known from then on.

        Args:
            strategy: The one that was asked for.
            deadline_ms: Of the request.

        Returns:
            The other strategy and how long to wait for the first, ms; None if nothing is sent in
            it either, or if every strategy sends.
        """
        silent = [i for i, bits in enumerate(self._table.sent_bits) if bits == 0]
        if strategy in silent or not silent:
            return None
        limit_ms = min(self.limit_ms, deadline_ms)
        takes = self._table.compute_ms
        quick = [i for i in silent if takes[i] <= limit_ms / 2]
        if quick:
            other = max(quick, key=lambda i: (self._table.accuracy[i], -takes[i]))
        else:
            other = min(silent, key=lambda i: float(takes[i]))
        spare_ms = PATIENCE * limit_ms - 1.5 * float(takes[other]) - self._link_ms
        expected_ms = 1.2 * float(self._table.latency_ms(self.bits_per_s)[strategy])
        return other, max(0.0, spare_ms, min(expected_ms, limit_ms))

    def decided(self, strategy: int, decision: Decision, round_trip_ms: float) -> None:
        """A request was decided: what its messages took tells the bandwidth.

        Args:
            strategy: That was asked for.
            decision: What came.
            round_trip_ms: From asking to the decision.
        """
        bits = float(self._table.sent_bits[strategy])
        if bits == 0 or decision.bytes_received == 0 or not self._whole[strategy]:
            return
        took = decision.latency
        sending_ms = round_trip_ms - took.queue_ms - took.inference_ms - took.fusion_ms
        sending_ms -= self._link_ms * float(self._table.messages[strategy])
        self._observe(1e3 * bits / max(sending_ms, 1e-3))

    def silent(self, strategy: int, waited_ms: float) -> None:
        """A request is not decided yet: if that is later than it seemed, the link is slower."""
        bits = float(self._table.sent_bits[strategy])
        waited_ms -= float(self._table.compute_ms[strategy])
        waited_ms -= self._link_ms * float(self._table.messages[strategy])
        if bits > 0 and waited_ms > 0 and 1e3 * bits / waited_ms < self.bits_per_s:
            self._observe(0.5e3 * bits / waited_ms)

    def probe(self) -> int | None:
        """The strategy to measure with if nothing has been measured for long, else None."""
        if self._clock() - self._measured_s < PROBE_EVERY_S:
            return None
        sent = self._table.sent_bits
        sending = [i for i in range(len(sent)) if sent[i] > 0]
        if not sending:
            return None
        self._measured_s = self._clock()
        large = [i for i in sending if sent[i] >= 8 * PROBE_BYTES]
        return min(large, key=lambda i: sent[i]) if large else max(sending, key=lambda i: sent[i])

    def _observe(self, bits_per_s: float) -> None:
        self._measured_s = self._clock()
        self._chooser.observe(min(bits_per_s, self._highest_bits_per_s))


def _log(bits_per_s: float) -> float:
    return math.log10(max(bits_per_s, LOWEST_BITS_PER_S))
