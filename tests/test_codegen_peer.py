"""A peer's kernels are called as TFLite-Micro calls CMSIS-NN's: with a stand-in of our own.

What CMSIS-NN itself says is compared by `python -m benchmarks.codegen_peer`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import codegen_peer
from exporter.codegen.graph import read_graph
from firmware_tools.measure import PREFIX
from tests.test_codegen import convolution, fully_connected, micro, samples

pytest.importorskip("tflite_micro", reason="tflite_micro is not installed")

FACE = """
#include <stdint.h>
typedef struct { void *buf; int32_t size; } cmsis_nn_context;
typedef struct { int32_t n, h, w, c; } cmsis_nn_dims;
typedef struct { int32_t w, h; } cmsis_nn_tile;
typedef struct { int32_t min, max; } cmsis_nn_activation;
typedef struct { int32_t *multiplier, *shift; } cmsis_nn_per_channel_quant_params;
typedef struct { int32_t multiplier, shift; } cmsis_nn_per_tensor_quant_params;
typedef struct {
    int32_t input_offset, output_offset;
    cmsis_nn_tile stride, padding, dilation;
    cmsis_nn_activation activation;
} cmsis_nn_conv_params;
typedef struct {
    int32_t input_offset, output_offset, ch_mult;
    cmsis_nn_tile stride, padding, dilation;
    cmsis_nn_activation activation;
} cmsis_nn_dw_conv_params;
typedef struct {
    int32_t input_offset, filter_offset, output_offset;
    cmsis_nn_activation activation;
} cmsis_nn_fc_params;

static inline int8_t stored(int64_t sum, int32_t multiplier, int32_t shift, int32_t offset,
                            cmsis_nn_activation range)
{
    const int64_t t = (sum * (1LL << (shift > 0 ? shift : 0)) * multiplier + (1LL << 30)) >> 31;
    const int32_t right = shift < 0 ? -shift : 0;
    const int64_t half = right > 0 ? (1LL << (right - 1)) - (t < 0) : 0;
    int64_t value = ((t + half) >> right) + offset;
    value = value < range.min ? range.min : value;
    return value > range.max ? range.max : value;
}
"""

CONVOLUTION = """
int arm_{kind}_wrapper_s8(const cmsis_nn_context *ctx, const cmsis_nn_{kind}_params *p,
                          const cmsis_nn_per_channel_quant_params *q, const cmsis_nn_dims *in,
                          const int8_t *input, const cmsis_nn_dims *k, const int8_t *weights,
                          const cmsis_nn_dims *bias_dims, const int32_t *bias,
                          const cmsis_nn_dims *out, int8_t *output)
{{
    for (int y = 0; y < out->h; y++)
    for (int x = 0; x < out->w; x++)
    for (int o = 0; o < out->c; o++) {{
        int64_t sum = bias[o];
        for (int ky = 0; ky < k->h; ky++)
        for (int kx = 0; kx < k->w; kx++)
        for (int c = {first}; c < {end}; c++) {{
            const int iy = y * p->stride.h - p->padding.h + ky * p->dilation.h;
            const int ix = x * p->stride.w - p->padding.w + kx * p->dilation.w;
            if (iy >= 0 && iy < in->h && ix >= 0 && ix < in->w)
                sum += (input[(iy * in->w + ix) * in->c + c] + p->input_offset) * {weight};
        }}
        *output++ = stored(sum, q->multiplier[o], q->shift[o], p->output_offset, p->activation);
    }}
    return 0;
}}
"""

FULLY_CONNECTED = """
int arm_fully_connected_s8(const cmsis_nn_context *ctx, const cmsis_nn_fc_params *p,
                           const cmsis_nn_per_tensor_quant_params *q, const cmsis_nn_dims *in,
                           const int8_t *input, const cmsis_nn_dims *k, const int8_t *weights,
                           const cmsis_nn_dims *bias_dims, const int32_t *bias,
                           const cmsis_nn_dims *out, int8_t *output)
{
    for (int o = 0; o < out->c; o++) {
        int64_t sum = bias[o];
        for (int i = 0; i < k->n; i++)
            sum += (input[i] + p->input_offset) * weights[o * k->n + i];
        *output++ = stored(sum, q->multiplier, q->shift, p->output_offset, p->activation);
    }
    return 0;
}
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """A folder laid out as CMSIS-NN's; its C warns, as foreign C does."""
    for tool in (f"{PREFIX['arm']}gcc", "qemu-system-arm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("peer")
    for part in ("Include/Internal", *(f"Source/{name}" for name in codegen_peer.SOURCES)):
        (folder / part).mkdir(parents=True)
    bodies = {
        "convolve": CONVOLUTION.format(
            kind="convolve",
            first="0",
            end="in->c",
            weight="weights[((o * k->h + ky) * k->w + kx) * in->c + c]",
        ).replace("cmsis_nn_convolve_params", "cmsis_nn_conv_params"),
        "depthwise_conv": CONVOLUTION.format(
            kind="depthwise_conv",
            first="o / p->ch_mult",
            end="o / p->ch_mult + 1",
            weight="weights[(ky * k->w + kx) * k->c + o]",
        ).replace("cmsis_nn_depthwise_conv_params", "cmsis_nn_dw_conv_params"),
        "fully_connected": FULLY_CONNECTED,
    }
    faces = [body[: body.index(")\n{")] + ");" for body in bodies.values()]
    (folder / "Include" / "arm_nnfunctions.h").write_text("\n".join(["#pragma once", FACE, *faces]))
    for name, body in bodies.items():
        source = folder / "Source" / codegen_peer.SOURCES[0] / f"arm_{name}_s8.c"
        source.write_text('#include "arm_nnfunctions.h"\n' + body)
    return folder


@pytest.mark.parametrize("kind", ["plain", "column", "depthwise", "multiplied", "fully connected"])
def test_a_peer_is_given_the_layer_as_tflite_micro_gives_it(stand_in: Path, kind: str) -> None:
    rng = np.random.default_rng(5)
    if kind == "fully connected":
        tflite, shape = fully_connected(rng)
    else:
        tflite, shape = convolution(rng, kind)
    stored = samples(rng, shape)
    graph = read_graph(tflite)
    told = codegen_peer.run_operator(
        graph, graph.operators[0], stand_in, stored.reshape(len(stored), -1)
    )
    np.testing.assert_array_equal(told.outputs, micro(tflite, stored))
    assert told.instructions[0] > 0
    assert 0 < told.text_bytes < 4000


def test_without_a_checkout_the_peer_says_where_to_get_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.codegen_peer", "--cmsis-nn", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert codegen_peer.ORIGIN in done.stderr
