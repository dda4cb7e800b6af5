"""Which plan to take, and why, in one sentence. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from agent.protocol.units import format_bytes

from .candidates import Candidate
from .glances import Glance
from .points import Point

EQUAL = 0.05
"""Plans whose goal differs by less than this share count as equal: none is trained for it."""


GLANCE_MARGIN = 0.10
"""A candidate that is so far from accurate enough after a short training is given up."""


@dataclass(frozen=True)
class Wish:
    """What the user wants.

    Attributes:
        goal: What the plan shall have least of: latency, bytes, energy or memory.
        max_loss: Accuracy that it may have less than the model, as a share.
        max_loss_one_lost: The same with any one of its devices lost; None: that does not count.
        reference: Accuracy of the model on the samples that plans are chosen by; None: the best
            plan's, where there is no model.
    """

    goal: str = "latency"
    max_loss: float = 0.01
    max_loss_one_lost: float | None = None
    reference: float | None = None

    def against(self, points: Sequence[Point]) -> float:
        """The accuracy that losses are counted from."""
        known = [point.accuracy for point in points if point.accuracy is not None]
        return self.reference if self.reference is not None else max(known, default=0.0)

    def cost(self, point: Point) -> float:
        """What the goal has least of."""
        costs = {
            "latency": point.latency_ms,
            "bytes": point.sent_bytes,
            "energy": point.energy_mj,
            "memory": point.memory_share,
        }
        found = costs[self.goal]
        return inf if found is None else found

    def allows(self, point: Point, reference: float) -> bool:
        """Whether a trained plan is accurate enough."""
        if point.accuracy is None or point.accuracy < reference - self.max_loss - 1e-9:
            return False
        if self.max_loss_one_lost is None:
            return True
        return (point.one_lost or 0.0) >= reference - self.max_loss_one_lost - 1e-9

    @property
    def least_glanced(self) -> float:
        """The accuracy that is promising after a short training; any where there is no model."""
        return -inf if self.reference is None else self.reference - self.max_loss - GLANCE_MARGIN

    def text(self, point: Point) -> str:
        """The goal's cost for people."""
        texts = {
            "latency": f"{point.latency_ms:.3g} ms",
            "bytes": format_bytes(round(point.sent_bytes)),
            "energy": "an unknown energy"
            if point.energy_mj is None
            else f"{point.energy_mj:.3g} mJ",
            "memory": f"{point.memory_share * 100:.3g} % of a budget",
        }
        return texts[self.goal]


@dataclass(frozen=True)
class Choice:
    """What is recommended.

    Attributes:
        point: The plan to take; None: nothing could be made.
        meets: Whether it is accurate enough.
        open: Plans that are not trained and may be better, by their sketches.
        sentence: Which, and why.
    """

    point: Point | None
    meets: bool
    open: tuple[Point, ...]
    sentence: str


def best(points: Sequence[Point], wish: Wish) -> tuple[Point | None, bool]:
    """The plan with least of the goal among those accurate enough, else the most accurate.

    Returns:
        It, and whether it is accurate enough.
    """
    trained = [point for point in points if point.trained]
    reference = wish.against(trained)
    allowed = [point for point in trained if wish.allows(point, reference)]
    if allowed:
        order = sorted(allowed, key=lambda x: (wish.cost(x), -(x.accuracy or 0.0), x.name))
        return order[0], True
    order = sorted(trained, key=lambda x: (-(x.accuracy or 0.0), wish.cost(x), x.name))
    return (order[0] if order else None), False


def _worth(taken: Point, wish: Wish) -> float:
    """What a plan must cost less than to be worth training beside one that is accurate enough."""
    return wish.cost(taken) / (1 + EQUAL)


def still_open(points: Sequence[Point], wish: Wish) -> tuple[Point, ...]:
    """Sketches that may yet be chosen, the most promising first."""
    taken, meets = best(points, wish)
    limit = _worth(taken, wish) if taken is not None and meets else inf
    # Where losses are counted from the best plan, any plan may change who is accurate enough.
    limit = inf if wish.reference is None else limit
    found = [x for x in points if not x.trained and not x.hopeless and wish.cost(x) < limit]
    return tuple(sorted(found, key=lambda x: (wish.cost(x), x.name)))


def without_hope(
    points: Sequence[Point], glances: Sequence[Glance], wish: Wish
) -> tuple[Point, ...]:
    """Mark sketches of which a stronger plan of the same method was not accurate enough.

    Args:
        points: All of a fleet.
        glances: Short trainings, of candidates of this fleet or not.
        wish: What is accurate enough; without a reference nothing is given up.
    """
    if wish.reference is None:
        return tuple(points)
    failed: dict[str, tuple[float, str]] = {}
    strengths = {point.candidate: point.strength for point in points}
    tried: dict[Candidate, list[Point]] = {}
    for point in points:
        if point.trained:
            tried.setdefault(point.candidate, []).append(point)
    seen = [
        (candidate, "was not accurate enough")
        for candidate, own in tried.items()
        if not any(wish.allows(point, wish.reference) for point in own)
    ]
    least = wish.least_glanced
    seen += [
        (glance.candidate, f"had {glance.accuracy * 100:.1f} % after a short training")
        for glance in glances
        if glance.accuracy < least and glance.candidate in strengths
    ]
    for candidate, why in seen:
        strength = strengths[candidate]
        if strength >= failed.get(candidate.method, (-inf, ""))[0]:
            failed[candidate.method] = strength, f"{candidate.name} {why}"
    marked = []
    for point in points:
        strength, why = failed.get(point.candidate.method, (-inf, ""))
        given_up = not point.trained and point.strength <= strength < inf
        marked.append(replace(point, hopeless=why) if given_up else point)
    return tuple(marked)


def pareto(points: Sequence[Point]) -> frozenset[Point]:
    """Trained plans than which none is better in one way and as good in all others.

    Ways: accuracy, with one device lost, latency, bytes, energy, the fullest budget.
    """

    def ways(point: Point) -> tuple[float, ...]:
        energy = inf if point.energy_mj is None else point.energy_mj
        return (
            -(point.accuracy or 0.0),
            -(point.one_lost or 0.0),
            point.latency_ms,
            point.sent_bytes,
            energy,
            point.memory_share,
        )

    trained = {point: ways(point) for point in points if point.trained}

    def beaten(own: tuple[float, ...]) -> bool:
        return any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True))
            for other in trained.values()
        )

    return frozenset(point for point, own in trained.items() if not beaten(own))


def choose(points: Sequence[Point], wish: Wish) -> Choice:
    """Recommend one plan.

    Args:
        points: Trained plans and sketches of one fleet.
        wish: What the user wants.
    """
    taken, meets = best(points, wish)
    left = still_open(points, wish)
    if taken is None:
        said = "No plan could be made for this fleet."
        return Choice(None, False, left, said)
    return Choice(taken, meets, left, _sentence(taken, meets, left, points, wish))


def _sentence(
    taken: Point, meets: bool, left: Sequence[Point], points: Sequence[Point], wish: Wish
) -> str:
    reference = wish.against([point for point in points if point.trained])
    accuracy = taken.accuracy or 0.0
    below = (reference - accuracy) * 100
    loss = "as accurate as the model" if below < 0.005 else f"{below:.2f} points below the model"
    if below < -0.005:
        loss = f"{-below:.2f} points above the model"
    words = [
        f"Take {_called(taken)}: {wish.text(taken)} a decision (estimated), "
        f"{accuracy * 100:.2f} % right (measured), {loss}"
    ]
    if not meets:
        words = [
            f"No plan stays within {_points(wish.max_loss)} of the model's "
            f"{reference * 100:.2f} %"
            + ("" if wish.max_loss_one_lost is None else " as asked for, one device lost or not")
            + f"; the most accurate is {_called(taken)}, {accuracy * 100:.2f} % right (measured), "
            f"{wish.text(taken)} a decision (estimated)"
        ]
    words.append(_against_single(taken, points, wish, reference))
    if taken.candidate.method != "single":
        words.append(
            f"; with its worst device lost it is {taken.one_lost * 100:.2f} % right"
            if taken.one_lost is not None
            else "; it needs all of its devices"
        )
    if left:
        words.append(
            f". Not settled: {len(left)} plan{'s' * (len(left) > 1)} not trained yet may be better"
        )
    return "".join(words) + "."


def _against_single(taken: Point, points: Sequence[Point], wish: Wish, reference: float) -> str:
    alone = [x for x in points if x.candidate.method == "single"]
    splits = [x for x in points if x.candidate.method != "single"]
    if taken.candidate.method == "single":
        able = [x for x in splits if (wish.allows(x, reference) if x.trained else not x.hopeless)]
        if not able:
            return "; splitting does not pay here: no split is accurate enough"
        rival = min(able, key=wish.cost)
        if rival.trained:
            told = f"the best split, {_called(rival)}, takes {wish.text(rival)} (estimated)"
        else:
            least = f"{wish.text(rival)} (estimated, {_called(rival)})"
            if wish.cost(rival) < _worth(taken, wish):
                return f"; a split may yet take as little as {least}"
            told = f"no split can take less than {least}"
            if wish.cost(rival) < wish.cost(taken):
                told += ", which counts as equal"
        poor = [x for x in splits if x.hopeless and wish.cost(x) < wish.cost(rival)]
        if poor:
            told += f"; those that do are not accurate enough: {min(poor, key=wish.cost).hopeless}"
        return f"; splitting does not pay here: {told}"
    if not alone:
        return "; no single device holds the whole network"
    rival = min(alone, key=wish.cost)
    if wish.cost(taken) <= 0:
        return ""
    times = wish.cost(rival) / wish.cost(taken)
    if times < 1:
        return f"; the whole network on {rival.candidate.devices[0]} takes {wish.text(rival)}"
    return (
        f", {times:.2g} times less {_GOALS[wish.goal]} than the whole network on "
        f"{rival.candidate.devices[0]} ({wish.text(rival)})"
    )


def _points(share: float) -> str:
    number = f"{share * 100:g}"
    return f"{number} point" if number == "1" else f"{number} points"


_GOALS = {"latency": "time", "bytes": "traffic", "energy": "energy", "memory": "memory"}


def _called(point: Point) -> str:
    """A plan for people."""
    devices = " ".join(point.candidate.devices)
    if point.candidate.method == "single":
        return f"the whole network on {devices}"
    settings = point.candidate.settings_text
    own = f"{point.candidate.method} {settings}".strip()
    return f"{own} on {devices}"
