/* One model as generated code: what firmware, the host library and the benchmarks see of it. */
#ifndef SHOAL_PIECE_H
#define SHOAL_PIECE_H

#include <stdint.h>

/**
 * A piece. `run` computes one inference, writes nothing but output and arena, and keeps nothing
 * between calls: arena and output may be used for something else in between.
 *
 * input:  input_bytes bytes, int8, order row, column, channel; real = (value - zero) * scale.
 *         Not altered; may not overlap output or arena.
 * output: output_bytes bytes, int8, likewise; several outputs follow each other, in the order of
 *         the .tflite, and output_scale and output_zero_point are the first one's.
 * arena:  arena_bytes bytes on a 16-byte boundary; its contents need not be initialized.
 */
struct shoal_piece {
    const char *name;
    uint32_t input_bytes;
    uint32_t output_bytes;
    uint32_t arena_bytes;
    float input_scale;
    int32_t input_zero_point;
    float output_scale;
    int32_t output_zero_point;
    void (*run)(const int8_t *input, int8_t *output, void *arena);
};

#endif
