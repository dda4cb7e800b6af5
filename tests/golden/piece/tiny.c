#include "tiny.h"

/* A stand-in with the generated face: output[i] = -1 - input[i]. */
static void tiny_run(const int8_t *input, int8_t *output, void *arena)
{
    (void)arena;
    for (int32_t i = 0; i < TINY_OUTPUT_BYTES; i++) {
        output[i] = (int8_t)(-1 - input[i]);
    }
}

const struct shoal_piece tiny_piece = {
    .name = "tiny",
    .input_bytes = TINY_INPUT_BYTES,
    .output_bytes = TINY_OUTPUT_BYTES,
    .arena_bytes = TINY_ARENA_BYTES,
    .input_scale = 1.0f,
    .input_zero_point = 0,
    .output_scale = 1.0f,
    .output_zero_point = 0,
    .run = tiny_run,
};
