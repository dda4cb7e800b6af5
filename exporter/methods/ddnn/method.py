"""DDNN as a method: one network over devices, edges and cloud, trained together, cut at its tiers.

Design: all parts are trained jointly; device and edge blocks are folded to integers and written
exact to the bit, the rest is left to the pipeline's conversion. Settle: the exported pieces are
asked what they say about validation samples, and exit thresholds are chosen on that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.fleet import Fleet
from agent.protocol.manifest import FrameSpec
from agent.protocol.plan import FRAME, Fusion, Output, Piece, Plan
from exporter.data import DataSet, Split
from exporter.quantize.native_stderr import start_tensorflow

from ..face import Design, Progress, RunPiece, Settled, TrainedPiece, WrittenPiece
from . import traffic
from .evaluate import Assembled, inputs_of_parts, likeliest
from .exits import answered, choose, sweep
from .network import CLOUD, DDNN, EDGE_EXIT, LOCAL, Architecture, Floats, Votes
from .options import DdnnOptions
from .sections import figures, sections
from .tflite_block import FEATURES
from .tiers import Layout, PieceNames, layout, strategy

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True, eq=False)
class Views:
    """Samples by view.

    Attributes:
        frames: (N, D, H, W, C) uint8, in the order of the devices.
        present: (N, D) bool: a view of zeros alone shows nothing.
        labels: (N,) int64.
    """

    frames: NDArray[np.uint8]
    present: Votes
    labels: NDArray[np.int64]

    def take(self, index: NDArray[np.int64]) -> Views:
        """The samples at these positions."""
        return Views(self.frames[index], self.present[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class _Facts:
    """What `design` hands to `settle`."""

    roles: Layout
    names: PieceNames
    architecture: Architecture
    validation: Views
    unseen_guess: int


class DDNNMethod:
    """DDNN (Teerapittayanon et al.), as `exporter.methods.face.Method`."""

    def design(
        self,
        base: keras.Model | None,
        data: DataSet,
        fleet: Fleet,
        options: DdnnOptions,
        progress: Progress,
    ) -> Design:
        """Train all parts together and write the blocks.

        Raises:
            FleetFileError: tiers that no configuration of the paper has.
            DataError: data that does not fit the fleet, or options that contradict each other.
        """
        start_tensorflow()
        import keras

        from .train import train

        roles = layout(fleet)
        everything = views_of(data, Split(*_joined(data)), roles)
        training, validation = _cut(everything, options)
        architecture = _architecture(data, roles, options)
        keras.utils.set_random_seed(options.seed)
        network = DDNN(architecture)
        losses = train(
            network,
            training.frames,
            training.present,
            training.labels,
            options.training,
            progress,
        )
        names = _names(roles, network)
        pieces = _pieces(network, roles, names, training, options)
        return Design(
            pieces=pieces,
            facts=_Facts(
                roles,
                names,
                architecture,
                validation,
                likeliest(training.labels),
            ),
            frame=FrameSpec(
                shape=data.frame.shape,
                dtype="uint8",
                scale=(1.0,),
                offset=(-options.centre,),
            ),
            report={"losses": [round(loss, 4) for loss in losses]},
        )

    def settle(
        self, design: Design, data: DataSet, fleet: Fleet, options: DdnnOptions, run: RunPiece
    ) -> Settled:
        """Choose thresholds on what the exported pieces say, and make the plan.

        Raises:
            PlanDoesNotFit: no thresholds keep to the bounds.
        """
        facts: _Facts = design.facts
        roles, names, a = facts.roles, facts.names, facts.architecture
        costs = traffic.Costs(a, roles, fleet)
        exported = _exported(facts, run)
        held = facts.validation
        validation = exported.exits(exported.listen(held.frames, held.present))
        given = options.exits.thresholds
        operations = sweep(validation, held.labels, costs.device_bytes, costs.wire_ms, given=given)
        chosen = choose(operations, options.exits)
        tested = views_of(data, data.test, roles)
        said = exported.listen(tested.frames, tested.present)
        test = exported.exits(said)
        plan = Plan(
            method="ddnn",
            classes=data.classes,
            pieces=_plan_pieces(roles, names, raw=a.raw),
            strategies=(
                strategy(roles, names, a.score_fusion, a.feature_fusion, chosen.thresholds),
            ),
            unseen_guess=facts.unseen_guess,
        )

        def without(votes: Votes) -> NDArray[np.int64]:
            return answered(exported.exits(said, votes), chosen.thresholds).classes

        return Settled(
            plan=plan,
            pieces=(),
            figures=figures(test, tested.labels, chosen, costs, without, roles),
            report={
                "sections": sections(test, tested.labels, operations, chosen, costs, without, roles)
            },
        )


def views_of(data: DataSet, split: Split, roles: Layout) -> Views:
    """Each device's view of a split.

    Raises:
        DataError: frames that are no bytes or no images, or a view that the data does not have.
    """
    frames = split.frames if data.views is not None else split.frames[:, np.newaxis]
    problems = []
    if frames.dtype != np.uint8 or frames.ndim != 5:
        problems.append(
            f"views must be images of uint8 (N, views, H, W, C), are {frames.dtype} {frames.shape}"
        )
    elif frames.shape[1] <= max(roles.views):
        problems.append(
            f"the data has {frames.shape[1]} views, device {roles.workers[-1].id!r} and others "
            f"want {roles.views}"
        )
    if problems:
        raise DataError("\n".join(problems), "give one view a device, or fewer devices")
    own = frames[:, list(roles.views)]
    present = np.asarray(own.any(axis=(2, 3, 4)))
    seen = np.flatnonzero(present.any(axis=1))
    return Views(own[seen], present[seen], split.labels[seen])


def _joined(data: DataSet) -> tuple[NDArray[Any], NDArray[np.int64]]:
    return (
        np.concatenate([data.train.frames, data.held_out.frames]),
        np.concatenate([data.train.labels, data.held_out.labels]),
    )


def _cut(views: Views, options: DdnnOptions) -> tuple[Views, Views]:
    """Training and validation samples, stratified and seeded."""
    rng = np.random.default_rng(options.seed)
    held = np.zeros(len(views.labels), bool)
    for label in np.unique(views.labels):
        index = rng.permutation(np.flatnonzero(views.labels == label))
        held[index[: int(len(index) * options.validation_share)]] = True
    return views.take(np.flatnonzero(~held)), views.take(np.flatnonzero(held))


def _architecture(data: DataSet, roles: Layout, options: DdnnOptions) -> Architecture:
    if roles.edges and options.feature_fusion is Fusion.MEAN:
        raise DataError(
            "an edge takes bits, but the mean of bits is none", "fuse features by max or concat"
        )
    height, width, channels = data.frame.shape
    return Architecture(
        frame=(height, width, channels),
        classes=len(data.classes),
        devices=len(roles.workers),
        centre=options.centre,
        groups=roles.groups,
        filters=options.filters,
        score_filters=options.score_filters,
        hidden=options.hidden,
        edge_filters=options.edge_filters,
        cloud_filters=options.cloud_filters,
        cloud=options.cloud,
        score_fusion=options.score_fusion,
        feature_fusion=options.feature_fusion,
    )


def _names(roles: Layout, network: DDNN) -> PieceNames:
    return PieceNames(
        workers=tuple(f"{device.id}-block" for device in roles.workers),
        edges=tuple(f"{device.id}-block" for device in roles.edges),
        cloud="cloud",
        local=None if network.local is None else "local-scores",
        edge_exit=None if network.edge_exit is None else "edge-scores",
    )


def _plan_pieces(roles: Layout, names: PieceNames, *, raw: bool) -> tuple[Piece, ...]:
    both = (Output.SCORES, Output.FEATURES)
    given = (Output.FEATURES,) if raw else both
    pieces = [Piece(name=name, inputs=(FRAME,), outputs=given) for name in names.workers]
    for name, group in zip(names.edges, roles.groups, strict=True):
        heard = tuple(names.workers[i] for i in group)
        pieces.append(Piece(name=name, inputs=heard, outputs=both))
    senders = names.edges or names.workers
    only = (Output.SCORES,)
    if names.local is not None:
        pieces.append(Piece(name=names.local, inputs=names.workers, outputs=only))
    if names.edge_exit is not None:
        pieces.append(Piece(name=names.edge_exit, inputs=names.edges, outputs=only))
    pieces.append(Piece(name=names.cloud, inputs=senders, outputs=only))
    return tuple(pieces)


def _pieces(
    network: DDNN, roles: Layout, names: PieceNames, views: Views, options: DdnnOptions
) -> tuple[TrainedPiece | WrittenPiece, ...]:
    """All parts: blocks written exact to the bit, float layers for the pipeline to convert."""
    from .export import raw_frames, written_block

    a = network.architecture
    inputs = inputs_of_parts(network, views.frames, views.present)
    pieces: list[TrainedPiece | WrittenPiece] = []
    message = traffic.feature_message_bytes(a.feature_shape)
    for i, device in enumerate(roles.workers):
        name, about = names.workers[i], f"view {roles.views[i]}"
        if a.raw:
            frames = views.frames[views.present[:, i], i].astype(np.float32) - a.centre
            message = traffic.frame_message_bytes(a.frame)
            pieces.append(
                raw_frames(a.frame, name, device, frames, about, message, centre=a.centre)
            )
            continue
        model = network.devices[i]
        fed = inputs[model.name]
        pieces.append(
            written_block(model, name, device, fed, about, message, centre=options.centre)
        )
    message = traffic.feature_message_bytes(a.edge_feature_shape)
    for device, model, name in zip(roles.edges, network.edges, names.edges, strict=True):
        pieces.append(
            written_block(model, name, device, inputs[model.name], "edge", message, centre=None)
        )
    for host, part, piece_name in (
        (roles.fuser, network.local, names.local),
        (roles.fuser, network.edge_exit, names.edge_exit),
        (roles.cloud, network.cloud, names.cloud),
    ):
        if part is None or piece_name is None:
            continue
        fed = inputs[part.name]
        if part is network.cloud and a.cloud == "binary" and a.feature_fusion is not Fusion.MEAN:
            pieces.append(written_block(part, piece_name, host, fed, "cloud", 0, centre=None))
            continue
        pieces.append(
            TrainedPiece(
                name=piece_name,
                device=host.id,
                model=part,
                calibration=fed,
                message_bytes=0,
                about=part.name,
            )
        )
    return tuple(pieces)


def _exported(facts: _Facts, run: RunPiece) -> Assembled:
    """The exported pieces, put together as the plan does."""
    a, names = facts.architecture, facts.names
    pieces = dict(zip(a.device_parts, names.workers, strict=False))
    pieces |= dict(zip(a.edge_parts, names.edges, strict=True))
    pieces |= {CLOUD: names.cloud, LOCAL: names.local or "", EDGE_EXIT: names.edge_exit or ""}

    def run_part(part: str, x: Floats) -> tuple[Floats | None, Floats]:
        both = part in a.device_parts or part in a.edge_parts
        features = run(pieces[part], x, FEATURES) if both else None
        return features, run(pieces[part], x)

    return Assembled(a, run_part, facts.unseen_guess)
