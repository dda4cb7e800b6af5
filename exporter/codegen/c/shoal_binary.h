/* Kernels of packed blocks: weights of one bit, integer thresholds, activations of one bit. What
 * they compute is exact: the definition is docs/packed_blocks.md. No allocation, no recursion, no
 * float; the caller owns all memory. The preprocessor chooses: __ARM_FEATURE_DSP (M4, M7, M33,
 * M55) or portable C.
 *
 * Bits of a feature map lie in planes, one a channel: rows of row_bytes = ceil(width / 8) bytes,
 * column 0 the least significant bit of byte 0, bits beyond the width 0. Where a convolution reads
 * them, a plane begins with a zero byte, and a row of zeros lies above and below. */
#ifndef SHOAL_BINARY_H
#define SHOAL_BINARY_H

#include <stdint.h>

/**
 * Maxima over 3 x 3 windows, taken where they are one bit already: the maximum reaches a threshold
 * where any sum does. The map has `height` rows of `row_bytes` in a ring of `ring_bytes` a filter.
 */
struct shoal_bit_pool {
    const uint8_t *inverted;     /* a bit a filter, least significant first: the opposite */
    uint16_t height, width;      /* of the map */
    uint16_t filters;
    uint16_t out_height, out_width;
    uint16_t row_bytes, out_row_bytes;
    uint16_t ring_bytes;         /* holds three rows; whole rows and whole words */
    uint16_t out_first;          /* from a plane's begin to its first row */
    uint16_t stride;             /* 1 or 2 */
    uint16_t before_y, before_x; /* rows and columns before the map */
    uint32_t out_plane, out_bytes; /* from a plane to the next; all planes, with what is cleared */
};

/**
 * 3 x 3 convolution of uint8 pixels, order row, column, channel, with pooling and threshold.
 *
 * A weight of +1 takes x, one of -1 takes 255 - x: the absolute difference of x and a mask of 0 or
 * 255. What that adds, and the centre, is in the limit; beyond the border x is the centre.
 */
struct shoal_pixel_convp {
    struct shoal_bit_pool pool;
    const uint8_t *weights;   /* filter_bytes a filter: half a byte, low half first, for each four
                                 values of a kernel row; 1 = -1, what is left over 0 */
    const uint32_t *limits;   /* a filter: least sum at which the bit is 1 */
    uint16_t channels;
    uint16_t row_quads;       /* ceil(3 * channels / 4), 1 .. 128 */
    uint16_t filter_bytes;
    uint16_t padded_row;      /* bytes of a row with a pixel and slack at either side */
    uint32_t tail;            /* which bytes of a kernel row's last quad count */
    uint8_t centre;
    uint8_t flip;             /* XOR of every input byte: 0x80 where they are pixels less 128 */
};

/** scratch: masks, then three padded rows, then the ring; on a 4-byte boundary. */
void shoal_pixel_convp(const struct shoal_pixel_convp *k, const uint8_t *input, uint8_t *output,
                       void *scratch);

/**
 * 3 x 3 convolution of bits, with pooling and threshold; 32 pixels at a time, in counters that lie
 * across words. Beyond the border a bit is 0, which the starts make good.
 */
struct shoal_bit_convp {
    struct shoal_bit_pool pool;
    const uint16_t *weights; /* filters times channels, filled up to fours with zeros: bits 0..2
                                the upper row from left to right, 3..5 the middle one, 6..8 the
                                lower one; 1 = +1 */
    const uint16_t *starts;  /* counter_bits a filter, of what the counter begins with so that its
                                highest bit says the answer: a bit for each kind of pixel, bits
                                0..2 the first row's first, middle, last column, 3..5 middle rows,
                                6..8 the last row */
    uint16_t channels;
    uint16_t block;          /* channels at a time: a multiple of 4 */
    uint16_t counter_bits;   /* 6 .. 16 */
    uint32_t in_plane;       /* bytes from a plane to the next */
};

/** scratch: tables of `block` channels, counters of all filters twice, ring; 4-byte boundary. */
void shoal_bit_convp(const struct shoal_bit_convp *k, const uint8_t *input, uint8_t *output,
                     void *scratch);

/** Products of bits with rows of bits: both `words` words, what is left over 0 in both. */
struct shoal_bit_fc {
    const uint32_t *weights;
    const int32_t *limits; /* a unit: most bits that may differ where the result is 1 */
    uint16_t words;
    uint16_t units;
};

/** output: bits, least significant first, in whole words. input: on a 4-byte boundary. */
void shoal_bit_fc(const struct shoal_bit_fc *k, const uint32_t *input, uint32_t *output);

/** Scores: (2 * product + offset) / 2^shift to nearest, clamped to int8. */
struct shoal_bit_exit {
    const uint32_t *weights;
    const int32_t *offsets; /* a class; odd */
    uint16_t words;
    uint16_t classes;
    uint16_t inputs;        /* bits that count */
    uint16_t shift;         /* 2 .. 30 */
};

void shoal_bit_exit(const struct shoal_bit_exit *k, const uint32_t *input, int8_t *output);

/** Where the bits of a feature map are. */
struct shoal_bit_map {
    uint16_t height, width, channels;
    uint16_t row_bytes;
    uint32_t first, plane, bytes; /* to the first row; from plane to plane; all planes */
};

/** Bits as they travel: order row, column, channel, most significant first, the rest zeros. */
void shoal_bits_out(const struct shoal_bit_map *k, const uint8_t *planes, uint8_t *output);
/** Bits as int8, -1 and 1, in the same order. */
void shoal_bits_wide(const struct shoal_bit_map *k, const uint8_t *planes, int8_t *output);
void shoal_bits_in(const struct shoal_bit_map *k, const uint8_t *input, uint8_t *planes);

#endif
