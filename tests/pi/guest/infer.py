"""Runs inside a userland: put int8 inputs through a .tflite with the runtime that is there.

Arguments: MODEL.tflite INPUTS.npy (N, ...) int8, OUTPUTS.npy to write, (N, C) int8.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import numpy as np


def main(model: str, inputs: str, outputs: str) -> None:
    """Run every row as a batch of one."""
    litert = importlib.util.find_spec("ai_edge_litert") is not None
    runtime = importlib.import_module(
        "ai_edge_litert.interpreter" if litert else "tflite_runtime.interpreter"
    )
    interpreter = runtime.Interpreter(model_path=model, num_threads=1)
    interpreter.allocate_tensors()
    into = interpreter.get_input_details()[0]["index"]
    out = interpreter.get_output_details()[0]["index"]
    rows = []
    for row in np.load(inputs):
        interpreter.set_tensor(into, row[None])
        interpreter.invoke()
        rows.append(interpreter.get_tensor(out)[0])
    np.save(outputs, np.stack(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
