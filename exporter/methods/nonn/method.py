"""NoNN as a method: students that each learn a part of the teacher's filters, joined once.

Design: the teacher's filter activation network falls into communities; each device's student learns
its share of them and is as wide as its device allows; all are trained together with the layer that
joins them. Settle: as of any branches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.protocol.errors import PlanDoesNotFit
from agent.protocol.fleet import Fleet
from agent.protocol.manifest import Figure
from agent.protocol.plan import Fusion
from exporter.cost import Numbers, piece_cost
from exporter.data import DataSet
from exporter.graph import layer_graph
from exporter.training import Checkpoint, History, train

from ..branches import Branch, BranchNetwork, settle
from ..face import Design, Progress, RunPiece, Settled
from .communities import FilterNetwork, filter_network
from .loss import student_loss
from .options import NonnOptions, usual_dropout
from .partition import Filters, partition
from .sections import network_section, training_section
from .students import (
    Builder,
    StudentLimits,
    StudentShape,
    all_widest,
    dense_builder,
    wide_builder,
)
from .teacher import Teacher, teacher_of

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True, eq=False)
class Classroom:
    """A teacher, what its students learn, and the students, trained or not.

    Attributes:
        filters: The teacher's network of filters.
        parts: The filters of each student.
        network: The students, in the order of the fleet's workers, and the head.
    """

    teacher: Teacher
    filters: FilterNetwork
    parts: tuple[Filters, ...]
    network: BranchNetwork


class NoNN:
    """NoNN (Bhardwaj et al.), as `exporter.methods.face.Method`."""

    def design(
        self,
        base: keras.Model,
        data: DataSet,
        fleet: Fleet,
        options: NonnOptions,
        progress: Progress,
    ) -> Design:
        """Part the teacher's knowledge and train one student for each device of tier 0.

        Raises:
            PlanDoesNotFit: a device that no student fits, or more devices than filters.
            UnsupportedLayer: a teacher without filters.
            DataError: data that cannot be trained on.
        """
        room = classroom(base, data, fleet, options)
        history = teach(room, data, options, progress)
        teacher_parameters = layer_graph(base).inference_parameters
        largest = max(_parameters(branch.model) for branch in room.network.branches)
        return Design(
            pieces=room.network.pieces(data, fleet),
            facts=room.network,
            figures={
                "teacher_to_student": Figure(
                    value=teacher_parameters / largest,
                    unit="times",
                    origin="estimated",
                    note="parameters of the teacher / of the largest student",
                )
            },
            report={
                "sections": [
                    network_section(
                        room.filters, room.parts, [b.device for b in room.network.branches]
                    ),
                    training_section(history),
                ]
            },
        )

    def settle(
        self, design: Design, data: DataSet, fleet: Fleet, options: Any, run: RunPiece
    ) -> Settled:
        """Make the plan, and measure it with each student lost."""
        settled = settle(design.facts, "nonn", data, fleet, run)
        sections = [*design.report["sections"], *settled.report["sections"]]
        return Settled(settled.plan, settled.pieces, settled.figures, {"sections": sections})


def classroom(base: keras.Model, data: DataSet, fleet: Fleet, options: NonnOptions) -> Classroom:
    """Part the teacher's filters and build untrained students.

    Raises:
        PlanDoesNotFit, UnsupportedLayer: as `NoNN.design`.
    """
    import keras

    teacher = teacher_of(base)
    workers = fleet.workers
    if len(workers) > teacher.filters:
        raise PlanDoesNotFit(
            f"{len(workers)} devices, but the teacher's {teacher.layer!r} has only "
            f"{teacher.filters} filters",
            "take fewer devices, or a teacher with more filters",
        )
    builder = options.builder or _default_builder(data, options)
    limits = StudentLimits(
        parameters=layer_graph(base).inference_parameters / options.ratio,
        macs=options.max_macs,
        energy_mj=options.max_energy_mj,
    )
    index = np.random.default_rng(options.seed).permutation(len(data.held_out))
    frames = data.held_out.frames[np.sort(index[: options.profile_samples])]
    filters = filter_network(teacher.activations(data.inputs(frames)), options.communities)

    def shapes(parts: list[int]) -> list[StudentShape]:
        return [
            StudentShape(1, count, data.frame.shape, f"student-{device.id}")
            for device, count in zip(workers, parts, strict=True)
        ]

    each = max(1, teacher.filters // len(workers))
    able = all_widest(builder, workers, shapes([each] * len(workers)), limits)
    parts = partition(filters, [cost.parameters for _, cost in able])
    sized = all_widest(builder, workers, shapes([len(part) for part in parts]), limits)
    keras.utils.set_random_seed(options.seed)
    branches = tuple(
        Branch(
            name=shape.name,
            device=device.id,
            model=builder(StudentShape(width, shape.features, shape.frame, shape.name)),
            about=f"{shape.features} filters of the teacher, width {width}",
        )
        for device, shape, (width, _) in zip(
            workers, shapes([len(part) for part in parts]), sized, strict=True
        )
    )
    joined = keras.Input((sum(map(len, parts)),), name="joined")
    logits = keras.layers.Dense(len(data.classes), name="logits")(joined)
    head = keras.Model(joined, logits, name="head")
    return Classroom(teacher, filters, parts, BranchNetwork(branches, head, Fusion.CONCAT))


def teach(room: Classroom, data: DataSet, options: NonnOptions, progress: Progress) -> History:
    """Train all students and the head together, in place; held-out data only tells how it goes.

    Raises:
        DataError: as `exporter.training.train`.
    """
    about = f"nonn {options.loss} {room.parts}"
    training, students = options.training, len(room.network.branches)
    if training.part_dropout is None:
        training = replace(training, part_dropout=usual_dropout(students))
    return train(
        room.network.models,
        student_loss(room.network, room.parts, options.loss, training.part_dropout or 0.0),
        data.train,
        data.inputs,
        training,
        parts=students,
        teacher=room.teacher.say,
        score=room.network.logits,
        validation=data.held_out,
        checkpoint=None if options.cache is None else Checkpoint(options.cache / "nonn", about),
        progress=progress,
        what="teach students",
    )


def _default_builder(data: DataSet, options: NonnOptions) -> Builder:
    return wide_builder(options.depth) if len(data.frame.shape) == 3 else dense_builder


def _parameters(model: keras.Model) -> int:
    return piece_cost(layer_graph(model), Numbers.INT8).parameters
