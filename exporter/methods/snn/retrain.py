"""After pruning: the SNNs compensated and distilled, in parallel and cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.data import DataSet
from exporter.surgery import without_softmax
from exporter.workers import content_key, map_cached

from .candidates import SubsetSearch
from .compensate import compensate
from .distill import DistillOptions, Row, base_logits, distill
from .masked import Floats
from .options import Snn, SnnOptions, plain
from .prune import build
from .source import source_key

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True, eq=False)
class _Lessons:
    """What a worker needs to say what the base says of the views of one epoch."""

    base: keras.Model
    options: DistillOptions
    frames: NDArray[Any]
    scale: tuple[float, ...]
    offset: tuple[float, ...]

    @cached_property
    def inputs(self) -> Floats:
        """(N, ...) float32 model inputs."""
        inputs = self.frames.astype(np.float32)
        inputs *= np.asarray(self.scale, np.float32)
        inputs += np.asarray(self.offset, np.float32)
        return inputs

    @cached_property
    def data(self) -> str:
        """Key of the base, the inputs and the options."""
        return content_key(
            source=source_key("exporter.methods.snn.distill", _lesson, _Lessons),
            base=[np.asarray(w) for w in self.base.get_weights()],
            distill=plain(self.options),
            frames=self.frames,
            preprocessing=[list(self.scale), list(self.offset)],
        )

    def key(self, epoch: int) -> str:
        """Of what the logits of this epoch depend on."""
        return content_key(what="lessons", data=self.data, epoch=epoch)


def _lesson(work: _Lessons, epoch: int) -> dict[str, NDArray[Any]]:
    return {"logits": base_logits(work.base, work.inputs, epoch, work.options)}


@dataclass(frozen=True, eq=False)
class _Retraining:
    """What a worker needs to compensate and distill any of the SNNs."""

    base: keras.Model
    options: SnnOptions
    held_out: Floats
    lessons: _Lessons | None
    taught: tuple[Floats, ...]

    def key(self, snn: Snn) -> str:
        """Of what the result for this SNN depends on."""
        keep = {group: np.packbits(mask) for group, mask in snn.pruned.keep.items()}
        return content_key(
            what="retrain", data=self._data, keep=keep, classes=list(snn.pruned.classes)
        )

    @cached_property
    def _data(self) -> str:
        return content_key(
            source=source_key(
                "exporter.methods.snn.prune",
                "exporter.methods.snn.compensate",
                "exporter.methods.snn.distill",
                _retrain_one,
            ),
            base=[np.asarray(w) for w in self.base.get_weights()],
            compensate=plain(self.options.compensate),
            held_out=self.held_out,
            lessons=None if self.lessons is None else self.lessons.data,
        )


def _retrain_one(work: _Retraining, snn: Snn) -> dict[str, NDArray[Any]]:
    """A compensated, distilled network: its configuration as JSON bytes, and its weights."""
    model = build(work.base, snn.pruned)
    rows: tuple[Row, ...] = snn.logits
    if work.options.compensate is not None:
        compensated = compensate(
            work.base, model, snn.pruned, work.held_out, options=work.options.compensate
        )
        model = compensated.model
    if work.lessons is not None:
        distilled = distill(
            work.base,
            model,
            snn.pruned,
            work.lessons.inputs,
            options=work.lessons.options,
            taught=work.taught,
        )
        model, rows = distilled.model, distilled.rows
    weights = {f"weight/{i:04d}": np.asarray(w) for i, w in enumerate(model.get_weights())}
    return {
        **weights,
        "config": np.frombuffer(model.to_json().encode(), np.uint8),
        "rows": np.asarray([str(row) for row in rows]),
    }


def retrained(
    search: SubsetSearch, base: keras.Model, snns: Sequence[Snn], held_out: Floats, data: DataSet
) -> tuple[tuple[Snn, ...], list[keras.Model]]:
    """The SNNs compensated and distilled, in parallel, and their networks."""
    import keras

    options, teacher = search.options, without_softmax(base)
    lessons: _Lessons | None = None
    taught: tuple[Floats, ...] = ()
    passes = len(snns) * len(held_out)
    if options.distill is not None:
        order = np.random.default_rng(options.seed).permutation(len(data.train))
        frames = data.train.frames[np.sort(order[: options.distill_samples])]
        lessons = _Lessons(teacher, options.distill, frames, data.frame.scale, data.frame.offset)
        views = options.distill.epochs * len(frames)
        passes += 3 * len(snns) * views  # forwards, and twice that backwards
        found = map_cached(
            _lesson,
            lessons,
            range(options.distill.epochs),
            lessons.key,
            cache=search.cache,
            workers=search.workers_for(views),
            progress=search.progress,
            what="ask the base about training views",
        )
        taught = tuple(x["logits"] for x in found)
    work = _Retraining(teacher, options, held_out, lessons, taught)
    results = map_cached(
        _retrain_one,
        work,
        snns,
        work.key,
        cache=search.cache,
        workers=search.workers_for(passes),
        progress=search.progress,
        what="compensate" if lessons is None else "distill",
    )
    models, finished = [], []
    for snn, result in zip(snns, results, strict=True):
        model = keras.models.model_from_json(result["config"].tobytes().decode())
        model.set_weights([w for k, w in sorted(result.items()) if k.startswith("weight/")])
        models.append(model)
        rows: tuple[Row, ...] = tuple(
            "rest" if row == "rest" else int(row) for row in result["rows"].tolist()
        )
        finished.append(replace(snn, logits=rows))
    return tuple(finished), models
