"""Side branches on a user's model, joint training of all exits, and the model cut in two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.protocol.errors import DataError
from exporter.data import DataSet
from exporter.graph import LayerGraph, Trace, layer_graph, trace
from exporter.inference import run_outputs
from exporter.methods.edgent.layers import chains
from exporter.methods.face import Progress
from exporter.training import Checkpoint, History, TrainOptions, cross_entropy, train

if TYPE_CHECKING:
    import keras

LARGEST_SIDE = 8
"""Branches first pool images down to this side: an exit shall be cheap."""
BRANCH_FILTERS = 64
SCORES = "scores"


def places(graph: LayerGraph) -> tuple[str, ...]:
    """Layers behind which a side branch may leave: one tensor crosses there; the last is no place.

    Args:
        graph: One input and one output.

    Raises:
        DataError: several outputs.
    """
    if len(graph.outputs) != 1:
        raise DataError(
            f"{graph.name} has {len(graph.outputs)} outputs: it has its exits already",
            "give a model with one output, or use its exits as they are",
        )
    (chain,) = chains(graph)
    return tuple(work.name for work in chain.layers[:-1] if work.output_elements is not None)


def places_by_macs(graph: LayerGraph, shares: Sequence[float]) -> tuple[str, ...]:
    """The place behind which each share of the model's multiply-accumulates is done, nearest.

    Args:
        graph: One input and one output.
        shares: Ascending, in (0, 1).

    Returns:
        As many places or fewer, in the model's order: two shares may have one nearest place.

    Raises:
        DataError: shares that do not ascend in (0, 1), or a model that cannot be cut anywhere.
    """
    if list(shares) != sorted(set(shares)) or not all(0 < share < 1 for share in shares):
        raise DataError(f"shares of MACs must ascend between 0 and 1, got {list(shares)}")
    allowed = places(graph)
    if not allowed:
        raise DataError(
            f"{graph.name}: nowhere does a single tensor cross: no exit can be attached",
            "give a model of layers that follow one another",
        )
    done, total = 0, max(1, graph.macs)
    reached: dict[str, float] = {}
    for layer in graph.layers:
        done += layer.macs
        reached[layer.name] = done / total
    # Of places with the same share the last: behind the pooling the tensor is smaller.
    backwards = allowed[::-1]
    off = np.abs(np.array([[reached[name] for name in backwards]]) - np.array([shares]).T)
    return tuple(dict.fromkeys(backwards[i] for i in off.argmin(axis=1)))


def add_exits(model: keras.Model, after: Sequence[str]) -> keras.Model:
    """A copy of a model with an exit behind each of some layers.

    A branch pools images to at most 8 x 8, convolves once (3 x 3, as many filters as there are
    channels, 16 to 64, batch norm, ReLU), pools the rest and ends in a dense layer; behind a vector
    it is one hidden dense layer of 16 to 64 units, and one for the scores.

    Args:
        model: One input, one output (N, classes) logits.
        after: Of `places`, in any order.

    Returns:
        A model with the outputs exit1, exit2, ... in the trunk's order, and the model's own last.
        New branches have random weights (seed them with `keras.utils.set_random_seed`), all else
        has the model's.

    Raises:
        DataError: names all layers that are no place.
        UnsupportedLayer: as `layer_graph`.
    """
    import keras

    graph = layer_graph(model)
    allowed = places(graph)
    if wrong := [name for name in after if name not in allowed]:
        raise DataError(
            f"no exit can leave behind {', '.join(wrong)}: no such layer, or not the only tensor "
            "that crosses there",
            f"places: {', '.join(allowed)}",
        )
    chosen = [name for name in allowed if name in set(after)]
    trunk = part(model, None, [*chosen, graph.outputs[0]])
    classes = graph.layer(graph.outputs[0]).channels
    outputs = [
        _branch(tensor, f"exit{number}", classes)
        for number, tensor in enumerate(trunk.outputs[:-1], 1)
    ]
    return keras.Model(trunk.inputs, [*outputs, trunk.outputs[-1]], name=f"branchy_{model.name}")


def _branch(x: Any, name: str, classes: int) -> Any:
    from keras import layers

    units = int(min(BRANCH_FILTERS, max(16, x.shape[-1])))
    if len(x.shape) == 4:
        step = -(-max(x.shape[1:3]) // LARGEST_SIDE)
        if step > 1:
            x = layers.MaxPooling2D(step, padding="same", name=f"{name}_pool")(x)
        x = layers.Conv2D(units, 3, padding="same", use_bias=False, name=f"{name}_conv")(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)
        x = layers.ReLU(name=f"{name}_relu")(x)
        x = layers.GlobalAveragePooling2D(name=f"{name}_mean")(x)
    else:
        if len(x.shape) > 2:
            x = layers.Flatten(name=f"{name}_flatten")(x)
        x = layers.Dense(units, activation="relu", name=f"{name}_fc")(x)
    return layers.Dense(classes, name=f"{name}_{SCORES}")(x)


def train_exits(
    model: keras.Model,
    data: DataSet,
    options: TrainOptions,
    *,
    weights: Sequence[float] | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress,
) -> History:
    """Train all exits together, in place: sum_n w_n CE_n over all samples (BranchyNet).

    Args:
        model: Its outputs are the exits' logits (N, classes).
        data: Trained on its training part; the last exit's accuracy is watched on held-out data.
        options: How.
        weights: Of the exits' losses; all 1 if not given.
        checkpoint: As `exporter.training.train`.
        progress: Told how far it is.

    Raises:
        DataError: not one positive weight an exit; or as `exporter.training.train`.
    """
    count = len(model.outputs)
    shares = [1.0] * count if weights is None else list(weights)
    if len(shares) != count or not all(share > 0 for share in shares):
        raise DataError(f"{count} exits need {count} positive weights of their losses: {shares}")

    def loss(x: Any, labels: Any, heard: Any, taught: Any) -> Any:
        said = model(x, training=True)
        losses = [cross_entropy(logits, labels, options.smoothing) for logits in said]
        return sum(share * one for share, one in zip(shares, losses, strict=True))

    def score(x: Any) -> Any:
        return exit_logits(model, x)[-1]

    about = "" if checkpoint is None else f"{checkpoint.about} exits {shares}"
    return train(
        [model],
        loss,
        data.train,
        data.inputs,
        options,
        score=score,
        validation=data.held_out,
        checkpoint=None if checkpoint is None else Checkpoint(checkpoint.folder, about),
        progress=progress,
        what="train exits",
    )


def exit_logits(model: keras.Model, inputs: Any) -> Any:
    """(exits, N, classes) float32: what every exit says."""
    return np.stack(run_outputs(model, inputs))


def part(
    model: keras.Model, behind: str | None, until: Sequence[str], *, name: str | None = None
) -> keras.Model:
    """A copy of the part of a model between a cut and some of its layers.

    Args:
        model: One input; several outputs are fine.
        behind: The layer behind whose output the part begins; None: at the model's input.
        until: Layers whose outputs the part returns, in this order.
        name: Of the new model.

    Returns:
        A functional model with layers of the same names and weights of its own.

    Raises:
        DataError: what `until` needs does not all come through the cut.
        UnsupportedLayer: as `layer_graph`.
    """
    import keras

    traced = trace(model)
    needed = _needed(traced, behind, until)
    built: dict[str, Any] = {}
    start: Any = None
    for call in traced.calls:
        if call.name == behind:
            shape = tuple(call.node.outputs[0].shape)[1:]
            start = built[behind] = keras.Input(shape, name=f"{behind}_in")
        elif call.name in needed:
            if not call.inputs:
                start = built[call.name] = keras.Input(
                    tuple(call.node.outputs[0].shape)[1:], name=call.name
                )
                continue
            built[call.name] = _again(call, built)
    return keras.Model(start, [built[x] for x in until], name=name or f"{model.name}_part")


def _again(call: Any, built: Mapping[str, Any]) -> Any:
    """A new layer as this one, called on what was built, with its weights."""
    fresh = type(call.layer).from_config(call.layer.get_config())
    tensors = {
        id(tensor): built[name]
        for tensor, name in zip(call.node.input_tensors, call.inputs, strict=True)
    }
    args, kwargs = call.node.arguments.fill_in(tensors)
    output = fresh(*args, **kwargs)
    if call.layer.get_weights():
        fresh.set_weights(call.layer.get_weights())
    return output


def _needed(traced: Trace, behind: str | None, until: Sequence[str]) -> set[str]:
    """Layers to build, without the one that is cut behind."""
    known = {call.name for call in traced.calls}
    if unknown := [x for x in (*until, *filter(None, [behind])) if x not in known]:
        raise DataError(f"no layer is called {', '.join(unknown)}")
    needed = set(until) - {behind}
    for call in reversed(traced.calls):
        if call.name in needed:
            needed.update(name for name in call.inputs if name != behind)
    sources = [call.name for call in traced.calls if call.name in needed and not call.inputs]
    if behind is not None and sources:
        raise DataError(
            f"behind {behind}, {', '.join(until)} still need {', '.join(sources)}: more than one "
            "tensor would have to cross",
            "cut at one of the network's places",
        )
    return needed
