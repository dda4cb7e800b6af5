/* Kernels of generated pieces. int8 activations, order row, column, channel; every result equals
 * TensorFlow Lite for Microcontrollers' byte for byte. No allocation, no recursion; the caller owns
 * all memory. The preprocessor chooses: __ARM_FEATURE_MVE (M55; convolutions, depthwise ones too,
 * and fully connected layers), __ARM_FEATURE_DSP (M4, M7, M33, M55) or portable C. */
#ifndef SHOAL_KERNELS_H
#define SHOAL_KERNELS_H

#include <stdint.h>

#if defined(__ARM_FEATURE_MVE) && ((__ARM_FEATURE_MVE & 1) == 1) && defined(__GNUC__)
#define SHOAL_MVE 1
#define SHOAL_BIAS(less_zero, stored) (stored)
#else
#define SHOAL_BIAS(less_zero, stored) (less_zero)
#endif

/**
 * One output channel: bias, and its factor multiplier / 2^31 * 2^left / 2^right.
 * rounding: half of 2^right, and the output's zero point times 2^right (fast layers only).
 */
struct shoal_channel {
    int32_t bias;
    int32_t multiplier;
    int32_t rounding;
    uint8_t left;
    uint8_t right;
    uint8_t doubled; /* left + 1 */
    uint8_t unused;
};

/**
 * A convolution, grouped or not, or a fully connected layer (a 1 x 1 convolution of one pixel).
 *
 * Input rows are widened once into a ring of ring_rows rows of int16, zero point subtracted, so the
 * output may overwrite input rows that were read before. An output is a sum over `segments`
 * stretches of `quads` times four values of the ring. Weights: for each pair of output channels,
 * segment and quad eight bytes: four of the first channel in the order 0, 2, 1, 3, then four of
 * the second. Channels of a group are padded to pairs, stretches to whole quads. Woven, where a row
 * of the output is one pixel: four int16, each the first channel's weight and 256 times the
 * second's.
 *
 * With MVE the ring holds bytes, zero point included, which biases make good, and of a pair all
 * weights of the first channel precede those of the second, in their own order.
 */
struct shoal_conv {
    const int8_t *weights;
    const struct shoal_channel *channels; /* one an output channel, padding included */
    uint16_t in_height, in_width, in_channels;
    uint16_t out_height, out_width, out_channels;
    uint16_t stride_y, stride_x;
    uint16_t kernel_height;  /* rows of the kernel */
    uint16_t row_segments;   /* stretches of a kernel row: 1, or its width */
    uint16_t segment_step;   /* int16 from one stretch of a row to the next */
    uint16_t dilation_y;
    uint16_t pad_top, pad_left;
    uint16_t ring_rows, ring_row;        /* rows; int16 in a row, slack included */
    uint16_t ring_columns;               /* pixels of a row that are ever read */
    uint16_t pixel, group_pixel;         /* int16 of a pixel and of a group in it; even if groups,
                                            or second pixels of a pair, would begin at odd places */
    uint16_t groups, group_channels;     /* group_channels: input channels of a group */
    uint16_t group_pairs, group_outputs; /* pairs and channels of outputs of a group */
    uint16_t quads;
    int16_t in_zero, out_zero, low, high; /* output is clamped to low..high */
    uint8_t fast; /* every sum times 2^(left + 1) fits int32, every right is at least 1 */
    uint8_t int4; /* weights are halves of bytes: of eight, the first four are the lower ones */
    uint16_t woven; /* 0, or quads after which the sums are taken apart: they hold no more */
};

/** scratch: list of stretches, ring, slab, one pair's weights if int4; on a 4-byte boundary. */
void shoal_conv(const struct shoal_conv *k, const int8_t *input, int8_t *output, void *scratch);

/**
 * A depthwise convolution with one output per input channel. The ring holds its rows a channel at a
 * time: `plane` values, an even number, of each. Weights: all of a channel together, row by row; a
 * few bytes after the last are read.
 */
struct shoal_depthwise {
    const int8_t *weights;
    const struct shoal_channel *channels;
    uint16_t in_height, in_width, channel_count;
    uint16_t out_height, out_width;
    uint16_t stride_y, stride_x;
    uint16_t kernel_height, kernel_width;
    uint16_t dilation_y, dilation_x;
    uint16_t pad_top, pad_left;
    uint16_t ring_rows, ring_columns; /* rows; pixels of a row that are ever read */
    uint16_t plane;
    int16_t in_zero, out_zero, low, high;
    uint8_t fast;
    uint8_t nine;  /* 3 x 3 beside each other, stride_x 1 or 2 */
    uint8_t words; /* of the ring that the taps of a row meet, 1 .. 4; 0: more, or nine */
};

/** scratch: a pointer and 2 * words words for each row of the kernel, ring; 4-byte boundary. */
void shoal_depthwise(const struct shoal_depthwise *k, const int8_t *input, int8_t *output,
                     void *scratch);

/** Sum of two tensors, each in steps of its own; output may be either input. */
struct shoal_add {
    int32_t first_zero, second_zero, out_zero;
    int32_t first_multiplier, second_multiplier, out_multiplier;
    int32_t second_half;  /* of 2^second_right */
    int32_t out_rounding; /* half of 2^out_right, and out_zero times it */
    uint8_t first_right, second_right, out_right;
    uint8_t fast; /* same shapes; first_multiplier is 1/2 and first_right 0; the others are not 0 */
    int16_t low, high;
};

/** Product of two tensors. */
struct shoal_mul {
    int32_t first_zero, second_zero, out_zero;
    int32_t multiplier;
    uint8_t left, right;
    int16_t low, high;
};

/** Output sizes, slowest first, and the inputs' strides: 0 where a side is repeated. */
struct shoal_broadcast {
    uint32_t size[4];
    uint32_t first[4];
    uint32_t second[4];
};

void shoal_add(const struct shoal_add *k, const struct shoal_broadcast *shape,
               const int8_t *first, const int8_t *second, int8_t *output);
void shoal_mul(const struct shoal_mul *k, const struct shoal_broadcast *shape,
               const int8_t *first, const int8_t *second, int8_t *output);

/** Pooling over windows; what lies beyond the border does not count. */
struct shoal_pool {
    uint16_t in_height, in_width, channels;
    uint16_t out_height, out_width;
    uint16_t stride_y, stride_x;
    uint16_t kernel_height, kernel_width;
    uint16_t pad_top, pad_left;
    int16_t low, high;
};

void shoal_max_pool(const struct shoal_pool *k, const int8_t *input, int8_t *output);
void shoal_average_pool(const struct shoal_pool *k, const int8_t *input, int8_t *output);

/** Mean over the middle of (outer, count, inner). */
struct shoal_mean {
    uint32_t outer, count, inner;
    int32_t in_zero, out_zero, multiplier;
    uint8_t left, right;
};

void shoal_mean(const struct shoal_mean *k, const int8_t *input, int8_t *output);

/** Copy into a larger tensor of four axes that is filled with `value`. */
struct shoal_pad {
    uint32_t in_size[4], before[4], out_size[4];
    int8_t value;
};

void shoal_pad(const struct shoal_pad *k, const int8_t *input, int8_t *output);

/** Part of a tensor of four axes: from `offset` on, `step` from one index of an axis to the next. */
struct shoal_slice {
    uint32_t offset, out_size[4], step[3];
};

void shoal_slice(const struct shoal_slice *k, const int8_t *input, int8_t *output);

/** Rows of row_bytes each to every out_step bytes: one input of a concatenation. */
void shoal_copy_rows(const int8_t *input, int8_t *output, uint32_t rows, uint32_t row_bytes,
                     uint32_t out_step);

/** output[i] = table[input[i] + 128]; output may be the input. */
void shoal_look_up(const int8_t *table, const int8_t *input, int8_t *output, uint32_t count);

/** Softmax of each row; exponentials: Q0.31 of differences 0, 1 ... from the row's maximum. */
void shoal_softmax(const int32_t *exponentials, uint32_t entries, const int8_t *input,
                   int8_t *output, uint32_t rows, uint32_t row);

#endif
