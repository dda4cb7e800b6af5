"""What `shoal plan` and `shoal export --method auto` do, and how they say it.

Light to import: a search brings TensorFlow, a what-if does not.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from agent.protocol.errors import DataError, PlanDoesNotFit
from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import Manifest
from agent.protocol.units import format_bytes
from exporter.report_measured import HEAD
from exporter.terminal import named_platforms, print_table

from .choice import Choice, Wish, pareto
from .measured import Beside, beside, live_of, read_kept
from .points import Point
from .saved import Known, latest

if TYPE_CHECKING:
    from exporter.methods.face import Progress

    from .evaluate import Task
    from .search import Found

SHOWN_UNTRAINED = 5
"""How many plans that were not trained the terminal names; --json and the page have all."""


@dataclass(frozen=True)
class Asked:
    """What a command was asked to find a plan for.

    Attributes:
        model: The .keras file, None where every method trains its own network.
        data: As `load_data` takes it.
        fleet: The fleet file.
        chosen: Options of the command.
        fixed: By method, settings that the user fixed.
    """

    model: Path | None
    data: str
    fleet: Path
    chosen: Mapping[str, Any]
    fixed: Mapping[str, Mapping[str, Any]]

    def task(self) -> Task:
        """What all candidates share."""
        from .evaluate import Task

        return Task(
            model=self.model,
            data=self.data,
            fleet=self.fleet,
            cache=self.chosen["cache"],
            seed=self.chosen["seed"],
            workers=self.chosen["workers"] or 1,
        )

    @property
    def wish(self) -> Wish:
        """What the plan shall have least of, and what it may lose."""
        lost = self.chosen["max_loss_one_lost"]
        return Wish(
            goal=self.chosen["goal"],
            max_loss=self.chosen["max_loss"] / 100,
            max_loss_one_lost=None if lost is None else lost / 100,
        )

    def search(self, task: Task, progress: Progress) -> Found:
        """Search as long as the options allow.

        Raises:
            ShoalError: as `search.search`.
        """
        from .search import Effort, search

        chosen = self.chosen
        effort = Effort(chosen["minutes"], chosen["workers"], chosen["everything"])
        platforms = named_platforms(chosen["platforms"])
        return search(task, self.wish, effort, progress, fixed=self.fixed, platforms=platforms)


def plan_all(
    asked: Asked,
    page: Path,
    progress: Progress,
    *,
    measured: Sequence[Path] = (),
    as_json: bool,
) -> None:
    """Search, print the table and the sentence, and draw the page.

    Args:
        asked: What for.
        page: Where the page is drawn.
        progress: Told what is going on.
        measured: Bundles whose fleets `shoal measure` measured.
        as_json: Print JSON instead of tables.

    Raises:
        ShoalError: as `search.search` and `measured.read_kept`, or the page cannot be written.
    """
    from .page import write_page

    kept = read_kept(measured)
    found = asked.search(asked.task(), progress)
    lived = beside(found.state, kept)
    write_page(page, found.state, found.known, found.choice, lived)
    if as_json:
        told = _as_json(found.known, found.choice, found.state.wish, lived)
        told |= {"report": str(page), "seconds": found.state.seconds, "trained": found.fresh}
        click.echo(json.dumps(told))
        return
    print_found(found, lived)
    click.echo(f"report: {page}")


def export_best(
    asked: Asked,
    out: Path,
    progress: Progress,
    *,
    dtype: Literal["int8", "float32"],
    targets: tuple[str, ...],
) -> tuple[Manifest, str]:
    """Search, and write the bundle of the plan to take.

    Returns:
        Its manifest, and why it was taken.

    Raises:
        PlanDoesNotFit: no plan could be made.
        ShoalError: as `search.search`.
    """
    from exporter.bundle import check_target

    from .search import bundle_of

    check_target(out)
    task = replace(asked.task(), dtype=dtype, targets=targets)
    found = asked.search(task, progress)
    taken = found.choice.point
    if taken is None:
        raise PlanDoesNotFit(
            "\n".join(_reasons(found.known)), "add devices, or give larger budgets"
        )
    return write_taken(bundle_of(task, taken.candidate), asked.fleet, out), found.choice.sentence


def export_named(
    name: str,
    asked: Asked,
    out: Path,
    progress: Progress,
    *,
    dtype: Literal["int8", "float32"],
    targets: tuple[str, ...],
) -> tuple[Manifest, str]:
    """Write the bundle of the plan with this name, trained now if no search has.

    It is kept as a search's own: the next one has it among those trained.

    Returns:
        Its manifest, and what is known of it.

    Raises:
        DataError: no plan of this fleet is called so.
        PlanDoesNotFit: it cannot be made.
        ShoalError: as `search.search`.
    """
    from exporter.bundle import check_target
    from exporter.workers import ResultCache, Workers, map_cached

    from .evaluate import evaluate, outcome_of, result_key
    from .saved import FOLDER
    from .search import begin

    check_target(out)
    task = replace(asked.task(), dtype=dtype, targets=targets)
    state = begin(task, asked.wish, asked.fixed)
    plans = {candidate.name: candidate for candidate in state.space(state.fleet)}
    wanted = " ".join(name.split())
    # The table names a plan's strategies too: "edgent on eye (device)".
    candidate = plans.get(wanted) or plans.get(wanted.rpartition(" (")[0])
    if candidate is None:
        close = difflib.get_close_matches(wanted, plans, n=3, cutoff=0.0)
        raise DataError(f"no plan is called {wanted!r}", f"there are: {'; '.join(close)}; ...")
    progress(f"make {candidate.name}", 0, 1)
    key = result_key(task, candidate, state.fleet)
    (result,) = map_cached(
        evaluate,
        task,
        [candidate],
        lambda _: key,
        cache=ResultCache(task.cache / FOLDER),
        workers=Workers(1),
    )
    outcome = outcome_of(result)
    if outcome.manifest is None:
        raise PlanDoesNotFit(f"{candidate.name}: {outcome.refused}", "take another plan")
    best = max(outcome.judged.values())
    return write_taken(result, asked.fleet, out), (
        f"{candidate.name}: {best * 100:.2f} % right (measured on {state.judged_by} samples held "
        "out for choosing)."
    )


def write_taken(result: Mapping[str, Any], fleet: Path, out: Path) -> Manifest:
    """Write a kept bundle, with the fleet file as it is now."""
    from agent.protocol.manifest import artifact, read_manifest, write_manifest
    from exporter.bundle import FLEET_COPY, fresh_folder
    from exporter.report import rewrite_report

    from .evaluate import unpack

    with fresh_folder(out) as folder:
        unpack(result, folder)
        copy = folder / FLEET_COPY
        copy.write_text(fleet.read_text(encoding="utf-8"), encoding="utf-8")
        manifest = read_manifest(folder).model_copy(update={"fleet": artifact(folder, copy)})
        write_manifest(folder, manifest)
        rewrite_report(folder)
    return manifest


def _as_json(
    known: Known, choice: Choice, wish: Wish, lived: Sequence[Beside] = ()
) -> dict[str, Any]:
    best = pareto(known.points)
    return {
        "goal": wish.goal,
        "model_accuracy": wish.reference,
        "sentence": choice.sentence,
        "chosen": None if choice.point is None else choice.point.as_json(),
        "accurate_enough": choice.meets,
        "settled": not choice.open,
        "plans": [
            {**point.as_json(), "pareto": point in best, "measured": _live_json(point, lived)}
            for point in sorted(known.points, key=lambda x: (not x.trained, wish.cost(x), x.name))
        ],
        "refused": [
            {"plan": candidate.name, "reason": reason}
            for candidate, reason in known.refused.items()
        ],
        "measured": [each.as_json() for each in lived],
    }


def _live_json(point: Point, lived: Sequence[Beside]) -> dict[str, Any] | None:
    live = live_of(point, lived)
    return None if live is None else asdict(live)


def _reasons(known: Known) -> list[str]:
    return [f"{candidate.name}: {reason}" for candidate, reason in known.refused.items()]


def print_found(found: Found, lived: Sequence[Beside]) -> None:
    """Print the table, what was measured of plans, and the sentence."""
    state, known, choice = found.state, found.known, found.choice
    best = pareto(known.points)
    trained = [point for point in known.points if point.trained]
    reference = state.wish.reference
    model = "" if reference is None else f"; the model is {reference * 100:.2f} % right"
    head = ["", "plan", "accuracy", "one lost", "latency", "sent", "energy", "fullest budget"]
    trained.sort(key=lambda x: (state.wish.cost(x), x.name))
    rows = [list(_row(point, choice, best)) for point in trained]
    about = "Latency, traffic and energy of a decision estimated."
    lives = [live_of(point, lived) for point in trained]
    if any(lives):
        head.insert(5, "measured")
        about += " Measured: its latency live, on the machines below."
        for row, live in zip(rows, lives, strict=True):
            row.insert(5, "-" if live is None else f"{live.latency_ms:.3g} ms")
    print_table(
        tuple(head),
        [tuple(row) for row in rows],
        f"Trained and measured on {state.judged_by} samples held out for choosing{model}. "
        f"{about} + : no other is better in every way",
    )
    for each in lived:
        if each.candidate is None:
            click.echo(f"{each.bundle}: {each.about}.")
            continue
        print_table(
            HEAD,
            [row.row() for row in each.rows],
            f"Predicted and measured, {each.title}. {each.about}",
        )
    untrained = [point for point in known.points if not point.trained]
    untrained.sort(key=lambda x: (state.wish.cost(x), x.name))
    if left := [point for point in untrained if not point.hopeless]:
        shown = left[:SHOWN_UNTRAINED]
        more = f", {len(left) - len(shown)} more" if len(left) > len(shown) else ""
        named = "; ".join(f"{x.name} {state.wish.text(x)}" for x in shown)
        click.echo(f"Not trained, at the least (estimated): {named}{more}.")
    for why, count in Counter(point.hopeless for point in untrained if point.hopeless).items():
        click.echo(f"Given up, {count} plan{'s' * (count > 1)}: {why}.")
    if known.refused:
        click.echo(f"Cannot be made: {len(known.refused)} (--json says why).")
    click.echo(choice.sentence)
    taken = choice.point
    if taken is not None and taken.test_accuracy is not None:
        click.echo(f"On test data it is {taken.test_accuracy * 100:.2f} % right (measured).")


def _row(point: Point, choice: Choice, best: frozenset[Point]) -> tuple[str, ...]:
    mark = ">" if point == choice.point else ("+" if point in best else "")
    return (
        mark,
        point.name,
        "-" if point.accuracy is None else f"{point.accuracy * 100:.2f} %",
        "-" if point.one_lost is None else f"{point.one_lost * 100:.2f} %",
        f"{point.latency_ms:.3g} ms",
        format_bytes(round(point.sent_bytes)),
        "-" if point.energy_mj is None else f"{point.energy_mj:.3g} mJ",
        f"{point.memory_share * 100:.2g} %",
    )


def answer_what_if(edits: Sequence[str], cache: Path, *, as_json: bool) -> None:
    """Say what another fleet would change, from the search that was kept last.

    Raises:
        ShoalError: no search is kept, or a change that is not understood.
    """
    from .what_if import what_if

    state = latest(cache)
    answer = what_if(state, edits)
    if as_json:
        told = _as_json(answer.known, answer.choice, state.wish)
        click.echo(json.dumps({"what_if": list(edits), "before": answer.before.sentence, **told}))
        return
    click.echo(f"Before: {answer.before.sentence}")
    click.echo(f"With {', '.join(edits)}: {answer.choice.sentence}")
    for line in answer.notes:
        click.echo(line)


def replan_bundle(bundle: Path, fleet: Path, out: Path | None, *, as_json: bool) -> None:
    """Say what of a bundle another fleet can use, and write it if asked to.

    Raises:
        ShoalError: no bundle, a mistake in the fleet file, or nothing that could be written.
    """
    from .replan import replan, write_moved

    found = replan(bundle, load_fleet(fleet))
    if out is not None:
        write_moved(found, bundle, fleet, out)
    if as_json:
        click.echo(json.dumps(found.as_json() | {"bundle": None if out is None else str(out)}))
        return
    for line in found.lines():
        click.echo(line)
    if out is not None:
        click.echo(f"bundle: {out}")
