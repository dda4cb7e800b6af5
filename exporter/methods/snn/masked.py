"""A base network with units switched off by masks: evaluated often and fast, never rebuilt.

This is the inner loop of every search. A removed unit is one that nobody reads, so the mask is
applied where a layer with a kernel reads its input: the result is that of `surgery.mask_channels`.
The network is traced once; what lies before the first mask that changes is computed once and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError

from ...channels import ChannelMap, Keep, channel_map
from ...graph import Flow, graph_of_trace, trace
from ...inference import at_once

if TYPE_CHECKING:
    import keras

Floats = NDArray[np.float32]
BATCH = 250
"""Inputs that are run at a time, at most."""


class MaskedModel:
    """A base network that takes masks.

    Attributes:
        model: The network, one input and one output (N, C); its weights are not changed.
        channels: Where its units sit.
        cuts: Indices of the layer calls through which everything after them flows: computation
            can start from the output of any of them. Cut 0 is the input itself.
        batch: How many inputs are run at a time; large frames are fewer.
    """

    def __init__(self, model: keras.Model) -> None:
        """Trace a model.

        Raises:
            UnsupportedLayer: as `graph.layer_graph`.
            DataError: several inputs or outputs.
        """
        self.model = model
        self._trace = trace(model)
        self.channels: ChannelMap = channel_map(graph_of_trace(self._trace, str(model.name)))
        if len(self._trace.inputs) != 1 or len(self._trace.outputs) != 1:
            raise DataError(
                f"model {model.name!r} has {len(self._trace.inputs)} inputs and "
                f"{len(self._trace.outputs)} outputs, not one each",
                "cut the model at one input and one output first",
            )
        self._position = {call.name: i for i, call in enumerate(self._trace.calls)}
        self._end = self._position[self._trace.outputs[0]]
        self._prunable = np.zeros(self.channels.total, np.bool_)
        for group in self.channels.groups:
            if not group.protected:
                offset = self.channels.offsets[group.name]
                self._prunable[offset : offset + group.size] = True
        self.cuts = tuple(self._find_cuts())
        self.batch = min(BATCH, at_once(model))
        self._functions: dict[tuple[int, int], Callable[..., Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Only the model travels to another process; the rest is made again there."""
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])  # type: ignore[misc]

    def _find_cuts(self) -> Iterator[int]:
        reach = list(range(len(self._trace.calls)))
        for i, call in enumerate(self._trace.calls):
            for name in call.inputs:
                reach[self._position[name]] = i
        furthest = 0
        for i in range(self._end + 1):
            if furthest <= i:
                yield i
            furthest = max(furthest, reach[i])

    def cut_before(self, groups: Sequence[str], *, activations: bool = False) -> int:
        """The last cut that no mask of these unit groups reaches: computation may start there.

        Args:
            groups: Names of unit groups.
            activations: The units' own activations shall lie behind the cut, too.
        """
        chosen = [self.channels.group(name) for name in groups]
        layers = [name for group in chosen for name in group.consumers]
        if activations:
            layers += [group.activation_layer for group in chosen]
        first = min((self._position[name] for name in layers), default=self._end)
        return max(cut for cut in self.cuts if cut < first or cut == 0)

    def run(
        self, values: Any, stays: Any, start: int = 0, stop: int | None = None
    ) -> dict[str, Any]:
        """Compute from the output of one call to that of another, inside a TF function.

        Args:
            values: Output of call `start`, (N, ...) float32 tensor.
            stays: (1, units) or (N, units) float32 tensor, 1 = the unit is read, 0 = it is not.
            start: A cut.
            stop: Index of a call; None = the model's output.

        Returns:
            The outputs of all calls on the way by layer name, unmasked as they are made.
        """
        import tensorflow as tf

        end = self._end if stop is None else stop
        computed: dict[str, Any] = {self._trace.calls[start].name: values}
        for call in self._trace.calls[start + 1 : end + 1]:
            reads = [computed[name] for name in call.inputs]
            ids = self.channels.units[call.inputs[0]]
            makes = self.channels.graph.layer(call.name).flow is Flow.MAKE
            if makes and self._prunable[ids].any():
                mask = tf.gather(stays, ids, axis=1)
                middle = [1] * (len(reads[0].shape) - 2)
                reads[0] *= tf.reshape(mask, (tf.shape(mask)[0], *middle, len(ids)))
            tensors = {
                id(tensor): value
                for tensor, value in zip(call.node.input_tensors, reads, strict=True)
            }
            args, kwargs = call.node.arguments.fill_in(tensors)
            computed[call.name] = call.layer(*args, **kwargs)
        return computed

    def output_of(self, computed: dict[str, Any], stop: int | None = None) -> Any:
        """Pick the output of call `stop` (None = the model's) out of what `run` returned."""
        return computed[self._trace.calls[self._end if stop is None else stop].name]

    def shape_at(self, cut: int) -> tuple[int, ...]:
        """Shape of one sample at the output of a cut."""
        return self.channels.graph.layers[cut].output_shape

    def stays(self, keep: Keep) -> Floats:
        """Masks by group as the (1, units) float32 row that `run` takes."""
        return self.channels.kept_units(keep).astype(np.float32)[None]

    def evaluate(
        self,
        values: Floats,
        keep: Keep,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Floats:
        """The output of call `stop` (None = logits) for the outputs of call `start`, masks applied.

        Args:
            values: (N, ...) float32, the model's inputs for start 0.
            keep: Masks by unit group.
            start: A cut.
            stop: A cut, or None.

        Returns:
            (N, ...) float32.
        """
        if stop == start:
            return values
        function = self._function(start, self._end if stop is None else stop)
        stays = self.stays(keep)
        starts = range(0, len(values), self.batch)
        return np.concatenate([function(values[i : i + self.batch], stays).numpy() for i in starts])

    def _function(self, start: int, stop: int) -> Callable[..., Any]:
        import tensorflow as tf

        if (start, stop) not in self._functions:
            signature = [
                tf.TensorSpec((None, *self.shape_at(start)), tf.float32),
                tf.TensorSpec((None, self.channels.total), tf.float32),
            ]

            def run(values: Any, stays: Any) -> Any:
                return self.output_of(self.run(values, stays, start, stop), stop)

            self._functions[start, stop] = tf.function(run, input_signature=signature)
        return self._functions[start, stop]
