"""Training: one loop for every method that trains networks of its own.

What is trained is a list of Keras models; how they belong together, and what they are taught, is
the caller's loss. The loop brings batches (augmented, seeded), the schedule, decay of kernels,
validation that never looks at test data, and checkpoints from which an interrupted run goes on to
the bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError

from .data import Split
from .methods.face import Progress

if TYPE_CHECKING:
    import keras

Floats = NDArray[np.float32]
Loss = Callable[[Any, Any, Any, Sequence[Any]], Any]
"""(inputs (N, ...) float32, labels (N,) int64, heard (N, parts) float32 of 0 and 1, what the
teacher says of the inputs) -> scalar loss, all tensors; it calls the models with training=True."""
TeacherCall = Callable[[Any], Sequence[Any]]
"""Inputs (N, ...) float32 -> tensors (N, ...), always the same for the same input."""
Inputs = Callable[[NDArray[Any]], Floats]
"""Raw frames (N, ...) -> model inputs (N, ...) float32, such as `DataSet.inputs`."""
Score = Callable[[Floats], Floats]
"""Model inputs (N, ...) -> logits (N, C) in inference."""

SAVE_EVERY_S = 20.0
"""Least time between two checkpoints of a run; the last epoch is always saved."""
ANSWERS_BYTES = 1 << 29
"""Of all that a teacher says, as far as it is remembered from one epoch to the next."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        epochs: Passes over the samples.
        batch: Samples of a step; an incomplete last batch is left out.
        optimizer: `adam` (Kingma & Ba 2015) or `sgd` with Nesterov momentum.
        rate: Peak learning rate.
        momentum: Of SGD; beta 1 of Adam.
        beta_2: Of Adam.
        schedule: `cosine` falls to 0; `steps` multiplies by `factor` after every `every` epochs.
        factor, every: Of `steps`.
        warm_up: Share of all steps in which the rate rises linearly.
        decay: L2: `decay` times each kernel is added to its gradient (biases, batch norm: none).
        crop_pixels: Images are shifted by up to so many pixels both ways, zeros move in.
        flip: Images are mirrored left to right half the time.
        smoothing: Share of the label that is spread over all classes; for losses that read it.
        part_dropout: Chance that a part is not heard for a sample, so that losing one is nothing
            new; one part always stays. 0: all are heard. None: so are they, unless the method has
            a chance of its own.
        keep: Which weights stay: those of the last epoch, or of the best on validation data.
        patience: Stop after so many epochs without a better validation accuracy; None: never.
        seed: Of order, augmentation and dropout; weights are drawn where models are built.
    """

    epochs: int = 30
    batch: int = 128
    optimizer: Literal["adam", "sgd"] = "adam"
    rate: float = 1e-3
    momentum: float = 0.9
    beta_2: float = 0.999
    schedule: Literal["cosine", "steps"] = "cosine"
    factor: float = 0.94
    every: int = 2
    warm_up: float = 0.0
    decay: float = 0.0
    crop_pixels: int = 0
    flip: bool = False
    smoothing: float = 0.0
    part_dropout: float | None = None
    keep: Literal["last", "best"] = "last"
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError, naming every one that is wrong."""
        problems = [
            f"{name} must be at least {least}, is {value}"
            for name, value, least in (
                ("epochs", self.epochs, 1),
                ("batch", self.batch, 2),
                ("every", self.every, 1),
                ("crop_pixels", self.crop_pixels, 0),
                ("decay", self.decay, 0),
                ("patience", 1 if self.patience is None else self.patience, 1),
            )
            if value < least
        ]
        for name, value in (("rate", self.rate), ("factor", self.factor)):
            if not value > 0:
                problems.append(f"{name} must be positive, is {value}")
        for name in ("momentum", "beta_2", "warm_up", "smoothing", "part_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                problems.append(f"{name} must be in [0, 1), is {getattr(self, name)}")
        if problems:
            raise DataError("\n".join(problems), "correct the training options")


@dataclass(frozen=True)
class Epoch:
    """One line of a run's log.

    Attributes:
        loss: Mean over the steps.
        accuracy: On validation data, a share; None without any.
    """

    epoch: int
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class History:
    """A finished run.

    Attributes:
        epochs: Every epoch that was trained.
        kept: Number of the epoch whose weights the models have now.
    """

    epochs: tuple[Epoch, ...]
    kept: int

    @property
    def accuracy(self) -> float | None:
        """On validation data, of the weights that were kept."""
        return next(row.accuracy for row in self.epochs if row.epoch == self.kept)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is kept, so that it can go on, or need not be done twice.

    Attributes:
        folder: Any folder of a cache.
        about: Whatever the loss depends on that neither options, data nor first weights tell.
    """

    folder: Path
    about: str = ""


def train(
    models: Sequence[keras.Model],
    loss: Loss,
    samples: Split,
    inputs: Inputs,
    options: TrainOptions,
    *,
    parts: int = 1,
    teacher: TeacherCall | None = None,
    score: Score | None = None,
    validation: Split | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress,
    what: str = "train",
) -> History:
    """Train models together, in place.

    The same inputs, first weights, options and thread counts give the same weights, also when the
    run was interrupted and goes on from its checkpoint.

    Args:
        models: All whose weights change.
        loss: Of a batch.
        samples: Raw frames (N, ...) and labels.
        inputs: Makes model inputs of (augmented) frames.
        options: How.
        parts: How many there are to be heard or not: the width of `heard`.
        teacher: Whom the models learn from; the loss is given what it says. Where frames are never
            augmented it is asked once about each. None: the loss is given nothing.
        score: Logits in inference, for validation.
        validation: What accuracy is measured on after each epoch; never test data.
        checkpoint: Where to keep the run; None: nowhere.
        progress: Told (`what`, epochs done, epochs), before that ("ask the teacher", samples).
        what: What is trained, for `progress`.

    Raises:
        DataError: fewer samples than a batch, augmentation of what is no image, or an early stop
            or `keep="best"` without validation data.
    """
    _check(samples, options, score, validation)
    run = _Run(models, loss, samples, inputs, options, parts, teacher)
    store = None if checkpoint is None else _Store(checkpoint, run)
    log: list[Epoch] = []
    if store is not None:
        log = store.load()
    saved_s = time.monotonic()
    if not _done(log, options):
        run.ask_once(progress)
    while not _done(log, options):
        progress(what, len(log), options.epochs)
        epoch = len(log) + 1
        mean = run.epoch(epoch)
        accuracy = None
        if score is not None and validation is not None:
            accuracy = _accuracy(score, inputs, validation)
        log.append(Epoch(epoch, mean, accuracy))
        if options.keep == "best" and _best(log) == epoch:
            run.remember()
        if store is not None and (_done(log, options) or time.monotonic() - saved_s > SAVE_EVERY_S):
            store.save(log)
            saved_s = time.monotonic()
    progress(what, options.epochs, options.epochs)
    kept = len(log)
    if options.keep == "best":
        run.recall()
        kept = _best(log)
    return History(tuple(log), kept)


def _check(
    samples: Split, options: TrainOptions, score: Score | None, validation: Split | None
) -> None:
    problems = []
    if len(samples) < options.batch:
        problems.append(f"{len(samples)} samples are fewer than one batch of {options.batch}")
    if (options.crop_pixels or options.flip) and samples.frames.ndim != 4:
        problems.append(
            f"frames of shape {samples.frames.shape[1:]} are no images: they cannot be shifted or "
            "mirrored"
        )
    chooses = options.keep == "best" or options.patience is not None
    if chooses and (score is None or validation is None):
        problems.append("the best epoch is told by validation data, and there is none")
    if problems:
        raise DataError(
            "\n".join(problems),
            "correct the data or the training options (--batch, --shift, --flip)",
        )


def _accuracy(score: Score, inputs: Inputs, validation: Split) -> float:
    logits = score(inputs(validation.frames))
    return float(np.mean(logits.argmax(axis=1) == validation.labels))


def _best(log: Sequence[Epoch]) -> int:
    """Number of the first epoch of the highest accuracy."""
    accuracies = [row.accuracy or 0.0 for row in log]
    return log[accuracies.index(max(accuracies))].epoch


def _done(log: Sequence[Epoch], options: TrainOptions) -> bool:
    """All epochs, or patience is at its end."""
    patience = options.epochs if options.patience is None else options.patience
    waited = len(log) - _best(log) if log else 0
    return len(log) >= options.epochs or waited >= patience


@dataclass(eq=False)
class _Run:
    """Models, optimizer and batches of one run."""

    models: Sequence[keras.Model]
    loss: Loss
    samples: Split
    inputs: Inputs
    options: TrainOptions
    parts: int
    teacher: TeacherCall | None = None
    best: list[NDArray[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        import keras
        import tensorflow as tf

        o = self.options
        self.trained = [v for model in self.models for v in model.trainable_variables]
        if o.optimizer == "adam":
            self.optimizer = keras.optimizers.Adam(o.rate, beta_1=o.momentum, beta_2=o.beta_2)
        else:
            self.optimizer = keras.optimizers.SGD(
                o.rate, momentum=o.momentum, nesterov=o.momentum > 0
            )
        self.optimizer.build(self.trained)
        self.step = self._traced()
        self.ask = tf.function(self.teacher or (lambda x: ()), reduce_retracing=True)
        self.answers: list[Floats] = []

    @property
    def state(self) -> list[Any]:
        """Every variable that changes: weights, statistics, dropout seeds, the optimizer's."""
        own = [v for model in self.models for v in model.variables]
        return [*own, *self.optimizer.variables]

    def epoch(self, number: int) -> float:
        """Train one epoch, counted from 1; its draws depend on the seed and its number alone."""
        o = self.options
        rng = np.random.default_rng([o.seed, number])
        steps = len(self.samples) // o.batch
        order = rng.permutation(len(self.samples))[: steps * o.batch].reshape(steps, o.batch)
        total = 0.0
        for done, index in enumerate(order):
            share = (number - 1 + done / steps) / o.epochs
            self.optimizer.learning_rate.assign(o.rate * rate_share(share, number, o))
            frames = augmented(self.samples.frames[index], o.crop_pixels, o.flip, rng)
            heard = drawn(o.batch, self.parts, o.part_dropout or 0.0, rng)
            x = self.inputs(frames)
            taught = self._taught(x, index)
            total += float(self.step(x, self.samples.labels[index], heard, taught))
        return total / steps

    def ask_once(self, progress: Progress) -> None:
        """Remember what the teacher says of every sample, if that stays the same and is not much.

        Args:
            progress: Told how many samples it was asked about.
        """
        o, count = self.options, len(self.samples)
        if self.teacher is None or o.crop_pixels or o.flip:
            return
        told: list[list[Floats]] = []
        for start in range(0, count, o.batch):
            progress("ask the teacher", start, count)
            x = self.inputs(self.samples.frames[start : start + o.batch])
            told.append([np.asarray(part) for part in self.ask(x)])
            if sum(part.nbytes for part in told[0]) * count > ANSWERS_BYTES * len(x):
                return
        progress("ask the teacher", count, count)
        self.answers = [np.concatenate(parts) for parts in zip(*told, strict=True)]

    def _taught(self, x: Floats, index: NDArray[np.intp]) -> list[Any]:
        """What the teacher says of a batch."""
        return [answer[index] for answer in self.answers] or list(self.ask(x))

    def remember(self) -> None:
        self.best = [_value(v) for model in self.models for v in model.variables]

    def recall(self) -> None:
        variables = [v for model in self.models for v in model.variables]
        for variable, value in zip(variables, self.best, strict=True):
            variable.assign(value)

    def _traced(self) -> Any:
        import tensorflow as tf

        kernels = [len(v.shape) > 1 for v in self.trained]
        decay = self.options.decay

        def step(x: Any, labels: Any, heard: Any, taught: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = self.loss(x, labels, heard, taught)
            # Not the Keras variables themselves: their zeros could not be made.
            plain = [v.value for v in self.trained]
            gradients = tape.gradient(loss, plain, unconnected_gradients="zero")
            if decay:
                gradients = [
                    g + decay * tf.convert_to_tensor(v) if kernel else g
                    for g, v, kernel in zip(gradients, self.trained, kernels, strict=True)
                ]
            self.optimizer.apply(gradients, self.trained)
            return loss

        return tf.function(step, reduce_retracing=True)


def rate_share(share: float, epoch: int, options: TrainOptions) -> float:
    """Of the peak rate, at a share of all steps in an epoch counted from 1."""
    if share < options.warm_up:
        return max(share / options.warm_up, 1e-3)
    if options.schedule == "steps":
        return options.factor ** ((epoch - 1) // options.every)
    rest = (share - options.warm_up) / (1 - options.warm_up)
    return 0.5 * (1 + math.cos(math.pi * rest))


def augmented(
    frames: NDArray[Any], crop_pixels: int, flip: bool, rng: np.random.Generator
) -> NDArray[Any]:
    """Images (N, H, W, C), each shifted and mirrored at random; same dtype."""
    x = frames
    if crop_pixels:
        p = crop_pixels
        height, width = x.shape[1:3]
        padded = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
        tops, lefts = rng.integers(0, 2 * p + 1, (2, len(x)))
        x = np.moveaxis(windows[np.arange(len(x)), tops, lefts], 1, -1)
    if flip:
        mirrored = rng.random(len(x)) < 0.5
        x = np.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
    return np.ascontiguousarray(x)


def drawn(count: int, parts: int, chance: float, rng: np.random.Generator) -> Floats:
    """Who is heard (count, parts) float32 when each is lost with a chance; one always stays."""
    heard = np.ones((count, parts), np.float32)
    if chance:
        heard = (rng.random((count, parts)) >= chance).astype(np.float32)
        survivors = rng.integers(0, parts, count)
        alone = np.flatnonzero(~heard.any(axis=1))
        heard[alone, survivors[alone]] = 1.0
    return heard


def cross_entropy(logits: Any, labels: Any, smoothing: float = 0.0) -> Any:
    """Mean cross-entropy of logits (N, C) and labels (N,), a scalar tensor."""
    import tensorflow as tf

    classes = logits.shape[-1]
    target = tf.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(target, logits))


def divergence(teacher: Any, student: Any, temperature: float) -> Any:
    """KL(softmax(teacher / T) || softmax(student / T)) of logits (N, C), mean over N (Hinton 2015).

    Times T^2, its gradients are about as large as those of the cross-entropy.
    """
    import tensorflow as tf

    log_p = tf.nn.log_softmax(teacher / temperature)
    log_q = tf.nn.log_softmax(student / temperature)
    return tf.reduce_mean(tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=1))


class _Store:
    """One run's checkpoint file: NAME.npz, and NAME.log beside it as JSON lines."""

    def __init__(self, checkpoint: Checkpoint, run: _Run) -> None:
        self.run = run
        folder = Path(checkpoint.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{_key(checkpoint.about, run)}.npz"

    def save(self, log: Sequence[Epoch]) -> None:
        arrays = {f"state/{i:05d}": _value(v) for i, v in enumerate(self.run.state)}
        arrays |= {f"best/{i:05d}": value for i, value in enumerate(self.run.best)}
        rows = [asdict(row) for row in log]
        arrays["log"] = np.frombuffer(json.dumps(rows).encode(), np.uint8)
        part = self.path.with_suffix(f".part{os.getpid()}.npz")
        np.savez(part, **arrays)  # type: ignore[arg-type]  # numpy's stub forgets the names
        part.replace(self.path)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        self.path.with_suffix(".log").write_text(lines, encoding="utf-8")

    def load(self) -> list[Epoch]:
        """The run so far, its state put back; empty if there is none, or it cannot be read."""
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                arrays: Mapping[str, NDArray[Any]] = {key: archive[key] for key in archive.files}
        except (OSError, ValueError):
            return []
        log = [Epoch(**row) for row in json.loads(arrays["log"].tobytes())]
        state = [arrays[key] for key in sorted(arrays) if key.startswith("state/")]
        for variable, value in zip(self.run.state, state, strict=True):
            variable.assign(value)
        self.run.best = [arrays[key] for key in sorted(arrays) if key.startswith("best/")]
        return log


def _key(about: str, run: _Run) -> str:
    """Of all that a run's outcome depends on: options, samples, first weights, and `about`."""
    digest = hashlib.sha256(json.dumps([about, asdict(run.options), run.parts]).encode())
    arrays = [run.samples.frames, run.samples.labels]
    arrays += [_value(v) for model in run.models for v in model.variables]
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(run.inputs(run.samples.frames[:1]).tobytes())
    return digest.hexdigest()[:24]


def _value(variable: Any) -> NDArray[Any]:
    """A copy of a Keras variable's value."""
    import keras

    return np.array(keras.ops.convert_to_numpy(variable.value))
