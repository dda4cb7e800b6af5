"""Run and measure a piece in the TFLite-Micro interpreter, and write it as C++ sources."""

from __future__ import annotations

import hashlib
import re
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import UnsupportedLayer, VerificationFailed
from exporter.quantize.native_stderr import captured_native_stderr
from exporter.quantize.rules import TFLM_METHODS, microcontroller_findings
from exporter.quantize.tflite_file import (
    BUFFER_ALIGNMENT_BYTES,
    TensorDetail,
    activation_bytes,
    operators,
    tensors,
)

_ARENA_SLACK_BYTES = 16 << 20
_ARENA_TOTAL = re.compile(r"Arena allocation total (\d+)")


class MicroInterpreter:
    """A piece loaded into TFLite-Micro's own interpreter, built for this machine.

    The kernels are TFLite-Micro's portable reference kernels. CMSIS-NN's are specified to give the
    same int8 results; Shoal does not take that on trust but tests firmware on its own.

    Args:
        tflite: The file's bytes.

    Raises:
        VerificationFailed: The tflite-micro package is not installed.
        UnsupportedLayer: TFLite-Micro refuses the file; says why in its own words.
    """

    def __init__(self, tflite: bytes) -> None:
        # Nothing of a generous arena is touched but what is used, and the measured total does not
        # depend on it.
        arena = _ARENA_SLACK_BYTES + 4 * activation_bytes(tflite)
        runtime = _runtime()
        failure: RuntimeError | None = None
        with captured_native_stderr() as said:
            try:
                self._interpreter: Any = runtime.Interpreter.from_bytes(tflite, arena_size=arena)
            except RuntimeError as error:
                failure = error
        if failure is not None:
            reason = " ".join(said.text.split()) or str(failure)
            raise UnsupportedLayer(
                f"TFLite-Micro refuses the piece: {reason}",
                "replace the layer, or give the piece to a device that runs LiteRT",
            ) from failure
        self._info = tensors(tflite)

    def run(self, stored: NDArray[Any]) -> list[NDArray[Any]]:
        """Run one inference per sample.

        Args:
            stored: (N, *input shape without its batch) in the input's dtype, already quantized.

        Returns:
            For each output, (N, *output shape without its batch) in that output's dtype.
        """
        outputs: list[list[NDArray[Any]]] = [[] for _ in self._info.outputs]
        for sample in stored:
            self._interpreter.set_input(sample[np.newaxis], 0)
            self._interpreter.invoke()
            for index, rows in enumerate(outputs):
                rows.append(np.array(self._interpreter.get_output(index)))
        return [np.concatenate(rows) for rows in outputs]

    def arena_bytes(self) -> int:
        """Measure the tensor arena: one inference on zeros, then the allocator's own record."""
        detail = self._info.inputs[0]
        self.run(np.zeros(detail.shape, detail.dtype))
        with captured_native_stderr() as said:
            self._interpreter.print_allocations()
        match = _ARENA_TOTAL.search(said.text)
        if match is None:
            raise RuntimeError(f"TFLite-Micro printed no arena total: {said.text!r}")
        return int(match.group(1))


def arena_bytes(tflite: bytes) -> int:
    """Measure how many bytes of RAM TFLite-Micro needs for a piece's tensors and bookkeeping.

    Measured, not estimated, in the TFLite-Micro interpreter on this 64-bit machine. Bookkeeping
    holds pointers, so for a 32-bit microcontroller it is an upper bound.

    Raises:
        VerificationFailed: The tflite-micro package is not installed.
        UnsupportedLayer: TFLite-Micro refuses the file.
        DataError: The bytes are no TFLite model.
    """
    return MicroInterpreter(tflite).arena_bytes()


def tflm_source(tflite: bytes, name: str) -> dict[str, str]:
    """Write a piece as sources for a TFLite-Micro build: deterministic, several fit one image.

    Every symbol starts with `shoal_<piece>`, made from the name; where the name holds anything but
    a-z, 0-9 and single underscores, a hash of it is appended, so two names never share a symbol.

    Args:
        tflite: The file's bytes.
        name: The piece's name.

    Returns:
        File name -> text: `<symbol>_model.h` and `.cc` (the bytes, 16-byte aligned, their length,
        the measured arena, input and output quantization; valid C11 as well as C++11),
        `<symbol>_operators.h` (registers just the operators that the piece uses) and
        `<symbol>_main.cc` (a sample that runs one inference).

    Raises:
        UnsupportedLayer: The piece breaks a rule of `microcontroller_findings`; all are listed.
        VerificationFailed: The tflite-micro package, which measures the arena, is not installed.
        DataError: The bytes are no TFLite model.
    """
    findings = microcontroller_findings(tflite)
    if findings:
        hints = dict.fromkeys(finding.hint for finding in findings)
        raise UnsupportedLayer("\n".join(map(str, findings)), "; ".join(hints))
    arena = -(-arena_bytes(tflite) // BUFFER_ALIGNMENT_BYTES) * BUFFER_ALIGNMENT_BYTES
    symbol = _symbol(name)
    return {
        f"{symbol}_model.h": _model_header(tflite, name, symbol, arena),
        f"{symbol}_model.cc": _model_array(tflite, name, symbol),
        f"{symbol}_operators.h": _operators_header(operators(tflite), name, symbol),
        f"{symbol}_main.cc": _sample_main(tflite, name, symbol),
    }


def _runtime() -> ModuleType:
    try:
        from tflite_micro import runtime
    except ImportError:
        raise VerificationFailed(
            "checking a microcontroller's piece needs the tflite-micro package (x86-64 Linux only)",
            'pip install "shoal[exporter]" on an x86-64 Linux machine, and export there',
        ) from None
    return runtime  # type: ignore[no-any-return]


def _symbol(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if plain != name:
        plain = f"{plain}_{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("_")
    return f"shoal_{plain}"


def _banner(name: str, what: str) -> str:
    printable = name.encode("ascii", "backslashreplace").decode().replace("*/", "* /")
    return f"/* Generated by shoal, do not edit. Piece {printable}: {what}. */\n"


def _quantization(prefix: str, detail: TensorDetail) -> str:
    elements = int(np.prod(detail.shape, dtype=np.int64))
    lines = [f"#define {prefix}_ELEMENTS {elements}"]
    if detail.scale is not None:
        scale = np.format_float_scientific(np.float32(detail.scale), unique=True, trim="0")
        lines += [
            f"#define {prefix}_SCALE {scale}f",
            f"#define {prefix}_ZERO_POINT ({detail.zero_point})",
        ]
    return "\n".join(lines) + "\n"


def _model_header(tflite: bytes, name: str, symbol: str, arena: int) -> str:
    upper = symbol.upper()
    info = tensors(tflite)
    parts = [_quantization(f"{upper}_INPUT_{d.index}", d) for d in info.inputs]
    parts += [_quantization(f"{upper}_OUTPUT_{d.index}", d) for d in info.outputs]
    return f"""{_banner(name, "sizes and declarations")}
#ifndef {upper}_MODEL_H
#define {upper}_MODEL_H

/* SHA-256 of the file: {hashlib.sha256(tflite).hexdigest()} */
#define {upper}_MODEL_BYTES {len(tflite)}

/* Measured in TFLite-Micro on a 64-bit host: an upper bound for a 32-bit target. */
#define {upper}_ARENA_BYTES {arena}

/* real = (stored - ZERO_POINT) * SCALE; no SCALE means that the tensor is not quantized. */
{"".join(parts)}
#ifdef __cplusplus
extern "C" {{
#endif

extern const unsigned char {symbol}_model[{upper}_MODEL_BYTES];

#ifdef __cplusplus
}}
#endif

#endif
"""


def _model_array(tflite: bytes, name: str, symbol: str) -> str:
    rows = [
        "    " + " ".join(f"0x{byte:02x}," for byte in tflite[start : start + 16])
        for start in range(0, len(tflite), 16)
    ]
    body = "\n".join(rows)
    length = f"{symbol.upper()}_MODEL_BYTES"
    return f"""{_banner(name, "the .tflite file")}
#include "{symbol}_model.h"

#ifndef __cplusplus
#include <stdalign.h>
#endif

alignas({BUFFER_ALIGNMENT_BYTES}) const unsigned char {symbol}_model[{length}] = {{
{body}
}};
"""


def _operators_header(used: tuple[str, ...], name: str, symbol: str) -> str:
    upper = symbol.upper()
    refuse = " != kTfLiteOk) {\n    return kTfLiteError;\n  }\n"
    steps = "".join(f"  if (resolver.{TFLM_METHODS[operator]}(){refuse}" for operator in used)
    return f"""{_banner(name, "the operators it uses")}
#ifndef {upper}_OPERATORS_H
#define {upper}_OPERATORS_H

#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"

#define {upper}_OPERATOR_COUNT {len(used)}

inline TfLiteStatus {symbol}_register_operators(
    tflite::MicroMutableOpResolver<{upper}_OPERATOR_COUNT>& resolver) {{
{steps}  return kTfLiteOk;
}}

#endif
"""


def _sample_main(tflite: bytes, name: str, symbol: str) -> str:
    upper = symbol.upper()
    info = tensors(tflite)
    field = {"int8": "int8", "float32": "f"}
    source, result = field.get(info.inputs[0].dtype, "raw"), field.get(info.outputs[0].dtype, "raw")
    return f"""{_banner(name, "a sample that runs one inference")}
#include <cstdint>

#include "{symbol}_model.h"
#include "{symbol}_operators.h"
#include "tensorflow/lite/micro/micro_interpreter.h"
#include "tensorflow/lite/schema/schema_generated.h"

namespace {{
alignas({BUFFER_ALIGNMENT_BYTES}) std::uint8_t arena[{upper}_ARENA_BYTES];
}}

int main() {{
  static tflite::MicroMutableOpResolver<{upper}_OPERATOR_COUNT> resolver;
  if ({symbol}_register_operators(resolver) != kTfLiteOk) {{
    return 1;
  }}
  static tflite::MicroInterpreter interpreter(tflite::GetModel({symbol}_model), resolver, arena,
                                              sizeof(arena));
  if (interpreter.AllocateTensors() != kTfLiteOk) {{
    return 2;
  }}
  for (int i = 0; i < {upper}_INPUT_0_ELEMENTS; ++i) {{
    interpreter.input(0)->data.{source}[i] = 0; /* the sensor's frame goes here */
  }}
  if (interpreter.Invoke() != kTfLiteOk) {{
    return 3;
  }}
  int best = 0;
  for (int i = 1; i < {upper}_OUTPUT_0_ELEMENTS; ++i) {{
    if (interpreter.output(0)->data.{result}[i] > interpreter.output(0)->data.{result}[best]) {{
      best = i;
    }}
  }}
  return 4 + best; /* the index that output 0 ranks first */
}}
"""
