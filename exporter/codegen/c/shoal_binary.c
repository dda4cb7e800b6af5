#include "shoal_binary.h"

#include <string.h>

#if defined(__GNUC__)
#define SHOAL_INLINE static inline __attribute__((always_inline)) /* for each case of its own */
#else
#define SHOAL_INLINE static inline
#endif

static inline uint32_t load4(const uint8_t *from)
{
    uint32_t word;
    memcpy(&word, from, sizeof word);
    return word;
}

/* Little-endian bytes of a word, as many as there is room for. */
static inline void store_bytes(uint8_t *to, uint32_t word, uint32_t count)
{
    for (uint32_t i = 0U; i < count; i++) {
        to[i] = (uint8_t)(word >> (8U * i));
    }
}

/* The lowest `count` bits, 0 .. 32. */
static inline uint32_t low_bits(uint32_t count)
{
    return count >= 32U ? 0xFFFFFFFFU : (1U << count) - 1U;
}

/* ---- pooling -------------------------------------------------------------------------------- */

/* Columns 32 * number .. + 31 of rows first .. last, joined by OR. */
static uint32_t joined(const struct shoal_bit_pool *p, const uint8_t *ring, uint32_t first,
                       uint32_t last, uint32_t number)
{
    if (number * 32U >= p->width) {
        return 0U;
    }
    const uint32_t left = p->row_bytes - number * 4U;
    uint32_t word = 0U;
    for (uint32_t row = first; row <= last; row++) {
        const uint8_t *const at = ring + row * p->row_bytes % p->ring_bytes + number * 4U;
        if (left >= 4U) {
            word |= load4(at);
        } else {
            for (uint32_t i = 0U; i < left; i++) {
                word |= (uint32_t)at[i] << (8U * i);
            }
        }
    }
    return word & low_bits(p->width - number * 32U);
}

/* Bits 0, 2, 4 .. as bits 0, 1, 2 .. */
static uint32_t even_bits(uint32_t x)
{
    x &= 0x55555555U;
    x = (x | (x >> 1)) & 0x33333333U;
    x = (x | (x >> 2)) & 0x0F0F0F0FU;
    x = (x | (x >> 4)) & 0x00FF00FFU;
    return (x | (x >> 8)) & 0x0000FFFFU;
}

/* One row of one filter. first .. last: the map's rows in its windows. */
static void pool_row(const struct shoal_bit_pool *p, const uint8_t *ring, uint32_t first,
                     uint32_t last, uint32_t opposite, uint8_t *to)
{
    const uint32_t step = 32U / p->stride; /* columns a word gives */
    uint32_t before = 0U;
    uint32_t here = joined(p, ring, first, last, 0U);
    for (uint32_t number = 0U; number * step < p->out_width; number++) {
        const uint32_t after = joined(p, ring, first, last, number + 1U);
        const uint32_t right = (here >> 1) | (after << 31);
        uint32_t word = here | right;
        if (p->before_x != 0U) {
            word |= (here << 1) | (before >> 31);
        } else {
            word |= (here >> 2) | (after << 30);
        }
        if (p->stride == 2U) {
            word = even_bits(word);
        }
        const uint32_t columns = p->out_width - number * step;
        const uint32_t used = columns < step ? columns : step;
        store_bytes(to + number * (step / 8U), (word ^ opposite) & low_bits(used),
                    (used + 7U) / 8U);
        before = here;
        here = after;
    }
}

/* Writes the rows from *next on whose windows are known when `known` rows of the map are. */
static void pool_rows(const struct shoal_bit_pool *p, const uint8_t *rings, uint32_t known,
                      uint32_t *next, uint8_t *output)
{
    for (; *next < p->out_height; (*next)++) {
        const uint32_t from = *next * p->stride;
        const uint32_t first = from > p->before_y ? from - p->before_y : 0U;
        const uint32_t end = from + 2U - p->before_y;
        const uint32_t last = end < p->height ? end : p->height - 1U;
        if (last >= known) {
            return;
        }
        uint8_t *to = output + p->out_first + *next * p->out_row_bytes;
        for (uint32_t f = 0U; f < p->filters; f++) {
            const uint32_t inverted = ((uint32_t)p->inverted[f / 8U] >> (f % 8U)) & 1U;
            pool_row(p, rings + f * p->ring_bytes, first, last, 0U - inverted, to);
            to += p->out_plane;
        }
    }
}

/* ---- convolution of pixels ------------------------------------------------------------------ */

#define SHOAL_LANES 4U /* filters at a time */

/* Masks of four filters, for each quad of the kernel one of each. */
static void spread_weights(const struct shoal_pixel_convp *k, uint32_t first, uint32_t *masks)
{
    const uint32_t quads = 3U * k->row_quads;
    for (uint32_t lane = 0U; lane < SHOAL_LANES; lane++) {
        const uint32_t there = first + lane < k->pool.filters ? 1U : 0U;
        const uint8_t *const at = k->weights + (first + lane * there) * k->filter_bytes;
        uint32_t bits = 0U;
        for (uint32_t i = 0U; i < quads; i++) {
            bits = (i % 2U) == 0U ? at[i / 2U] : bits >> 4;
            masks[i * SHOAL_LANES + lane] = (((bits & 15U) * 0x204081U) & 0x1010101U) * 255U;
        }
    }
}

/* Sums of four filters. */
struct lanes {
    uint32_t of0, of1, of2, of3;
};

#if defined(__ARM_FEATURE_DSP) && (__ARM_FEATURE_DSP == 1) && defined(__GNUC__)

#define SHOAL_DIFFERENCES                                                                          \
    "ldmia %[masks]!, {r8, r9, r10, r11}\n\t"                                                      \
    "usada8 %[a], r12, r8, %[a]\n\t"                                                              \
    "usada8 %[b], r12, r9, %[b]\n\t"                                                              \
    "usada8 %[c], r12, r10, %[c]\n\t"                                                             \
    "usada8 %[d], r12, r11, %[d]\n\t"

/* Adds the absolute differences of a kernel row's values and the masks of four filters. */
SHOAL_INLINE const uint32_t *differences(const uint8_t *x, const uint32_t *masks, uint32_t quads,
                                         uint32_t tail, struct lanes *sums)
{
    struct lanes s = *sums;
    if (quads == 3U) { /* three channels, without a loop */
        __asm__("ldr r12, [%[x]]\n\t" SHOAL_DIFFERENCES
                "ldr r12, [%[x], #4]\n\t" SHOAL_DIFFERENCES
                "ldr r12, [%[x], #8]\n\t"
                "and r12, r12, %[tail]\n\t" SHOAL_DIFFERENCES
                : [masks] "+r"(masks), [a] "+r"(s.of0), [b] "+r"(s.of1), [c] "+r"(s.of2),
                  [d] "+r"(s.of3)
                : [x] "r"(x), [tail] "r"(tail)
                : "r8", "r9", "r10", "r11", "r12", "memory");
    } else {
        for (; quads > 1U; quads--) {
            __asm__("ldr r12, [%[x]], #4\n\t" SHOAL_DIFFERENCES
                    : [x] "+r"(x), [masks] "+r"(masks), [a] "+r"(s.of0), [b] "+r"(s.of1),
                      [c] "+r"(s.of2), [d] "+r"(s.of3)
                    :
                    : "r8", "r9", "r10", "r11", "r12", "memory");
        }
        __asm__("ldr r12, [%[x]]\n\t"
                "and r12, r12, %[tail]\n\t" SHOAL_DIFFERENCES
                : [masks] "+r"(masks), [a] "+r"(s.of0), [b] "+r"(s.of1), [c] "+r"(s.of2),
                  [d] "+r"(s.of3)
                : [x] "r"(x), [tail] "r"(tail)
                : "r8", "r9", "r10", "r11", "r12", "memory");
    }
    *sums = s;
    return masks;
}

#else

/* Bytes 0 and 2, and 1 and 3, added side by side in 16 bits. */
static inline uint32_t in_pairs(uint32_t bytes)
{
    return (bytes & 0xFF00FFU) + ((bytes >> 8) & 0xFF00FFU);
}

static inline uint32_t both(uint32_t pair)
{
    return (pair & 0xFFFFU) + (pair >> 16);
}

/* As above. */
SHOAL_INLINE const uint32_t *differences(const uint8_t *x, const uint32_t *masks, uint32_t quads,
                                         uint32_t tail, struct lanes *sums)
{
    struct lanes s = {0U, 0U, 0U, 0U};
    for (uint32_t q = 0U; q < quads; q++) {
        const uint32_t values = q + 1U == quads ? load4(x) & tail : load4(x);
        s.of0 += in_pairs(values ^ masks[0]);
        s.of1 += in_pairs(values ^ masks[1]);
        s.of2 += in_pairs(values ^ masks[2]);
        s.of3 += in_pairs(values ^ masks[3]);
        x += 4;
        masks += SHOAL_LANES;
    }
    sums->of0 += both(s.of0);
    sums->of1 += both(s.of1);
    sums->of2 += both(s.of2);
    sums->of3 += both(s.of3);
    return masks;
}

#endif

/* A row of four filters as bits. rows: of the kernel; to: of the first filter. */
SHOAL_INLINE void pixel_row(const struct shoal_pixel_convp *k, const uint8_t *const *rows,
                            const uint32_t *masks, uint32_t quads, uint32_t first, uint8_t *to)
{
    const uint32_t left = k->pool.filters - first;
    const uint32_t lanes = left < SHOAL_LANES ? left : SHOAL_LANES;
    const uint32_t *const limits = k->limits + first;
    struct lanes begin = {0U - limits[0], 0U, 0U, 0U};
    begin.of1 = lanes > 1U ? 0U - limits[1] : 0U;
    begin.of2 = lanes > 2U ? 0U - limits[2] : 0U;
    begin.of3 = lanes > 3U ? 0U - limits[3] : 0U;
    const uint32_t tail = k->tail;
    const uint32_t channels = k->channels;
    const uint8_t *top = rows[0];
    const uint8_t *middle = rows[1];
    const uint8_t *bottom = rows[2];
    for (uint32_t column = 0U; column < k->pool.width; column += 8U) {
        const uint32_t rest = k->pool.width - column;
        const uint32_t count = rest < 8U ? rest : 8U;
        /* A byte a filter. The sign says that the limit is not reached; it wanders down. */
        uint32_t below = 0U;
        for (uint32_t i = 0U; i < count; i++) {
            struct lanes sums = begin;
            const uint32_t *at = masks;
            at = differences(top, at, quads, tail, &sums);
            at = differences(middle, at, quads, tail, &sums);
            (void)differences(bottom, at, quads, tail, &sums);
            below = ((below >> 1) & 0x7F7F7F7FU) | ((sums.of0 >> 31) << 7) |
                    ((sums.of1 >> 31) << 15) | ((sums.of2 >> 31) << 23) |
                    (sums.of3 & 0x80000000U);
            top += channels;
            middle += channels;
            bottom += channels;
        }
        for (uint32_t lane = 0U; lane < lanes; lane++) {
            const uint32_t bits = (~below >> (8U * lane)) & 0xFFU;
            to[lane * k->pool.ring_bytes + column / 8U] = (uint8_t)(bits >> (8U - count));
        }
    }
}

/* Row `padded` counts from the row above the input. */
static void pad_row(const struct shoal_pixel_convp *k, const uint8_t *input, uint32_t padded,
                    uint8_t *to)
{
    memset(to, k->centre, k->padded_row);
    if ((padded != 0U) && (padded <= k->pool.height)) {
        const uint32_t bytes = (uint32_t)k->pool.width * k->channels;
        const uint8_t *const from = input + (padded - 1U) * bytes;
        to += k->channels;
        const uint32_t flip = k->flip * 0x1010101U;
        uint32_t i = 0U;
        for (; i + 4U <= bytes; i += 4U) {
            const uint32_t word = load4(from + i) ^ flip;
            memcpy(to + i, &word, sizeof word);
        }
        for (; i < bytes; i++) {
            to[i] = (uint8_t)(from[i] ^ k->flip);
        }
    }
}

void shoal_pixel_convp(const struct shoal_pixel_convp *k, const uint8_t *input, uint8_t *output,
                       void *scratch)
{
    const struct shoal_bit_pool *const p = &k->pool;
    uint32_t *const masks = (uint32_t *)scratch;
    uint8_t *const padded = (uint8_t *)(masks + 3U * SHOAL_LANES * k->row_quads);
    uint8_t *const rings = padded + 3U * k->padded_row;
    uint32_t next = 0U;
    memset(output, 0, p->out_bytes);
    pad_row(k, input, 0U, padded);
    pad_row(k, input, 1U, padded + k->padded_row);
    for (uint32_t y = 0U; y < p->height; y++) {
        pad_row(k, input, y + 2U, padded + (y + 2U) % 3U * k->padded_row);
        const uint8_t *const rows[3] = {padded + y % 3U * k->padded_row,
                                        padded + (y + 1U) % 3U * k->padded_row,
                                        padded + (y + 2U) % 3U * k->padded_row};
        uint8_t *const to = rings + y * p->row_bytes % p->ring_bytes;
        for (uint32_t f = 0U; f < p->filters; f += SHOAL_LANES) {
            if ((y == 0U) || (p->filters > SHOAL_LANES)) {
                spread_weights(k, f, masks);
            }
            uint8_t *const ring = to + f * p->ring_bytes;
            if (k->row_quads == 3U) {
                pixel_row(k, rows, masks, 3U, f, ring);
            } else {
                pixel_row(k, rows, masks, k->row_quads, f, ring);
            }
        }
        pool_rows(p, rings, y + 1U, &next, output);
    }
}

/* ---- convolution of bits -------------------------------------------------------------------- */

/* How many of three neighbours match: low and high bit of the count, of 32 pixels. */
struct matches {
    uint32_t low, high;
};

#define SHOAL_PATTERNS 8U
#define SHOAL_LOW_BITS 6U /* of a counter, held in registers */

/* Counts for each pattern of three weights; bit 0 of a pattern is the left one. */
static void count_matches(uint32_t left, uint32_t middle, uint32_t right, struct matches *to)
{
    const uint32_t u = left ^ middle;
    const uint32_t v = left ^ right;
    const uint32_t odd = u ^ right;
    const uint32_t all = left ^ (u & v);
    const uint32_t not_left = middle ^ ((middle ^ right) & ~u);
    const uint32_t not_middle = left ^ (v & ~u);
    const uint32_t not_right = left ^ (u & ~v);
    to[0].low = ~odd;
    to[0].high = ~all;
    to[1].low = odd;
    to[1].high = ~not_left;
    to[2].low = odd;
    to[2].high = ~not_middle;
    to[3].low = ~odd;
    to[3].high = not_right;
    to[4].low = odd;
    to[4].high = ~not_right;
    to[5].low = ~odd;
    to[5].high = not_middle;
    to[6].low = ~odd;
    to[6].high = not_left;
    to[7].low = odd;
    to[7].high = all;
}

/* Which of 32 pixels from a byte of the map on lie in the first and last row and column. */
struct edges {
    uint32_t top, bottom, left, right;
};

static struct edges edges_of(const struct shoal_bit_pool *p, uint32_t byte)
{
    struct edges e = {0U, 0U, 0U, 0U};
    uint32_t row = byte / p->row_bytes;
    uint32_t at = byte % p->row_bytes;
    for (uint32_t i = 0U; i < 32U; i += 8U) {
        if (row == 0U) {
            e.top |= 0xFFU << i;
        } else if (row == p->height - 1U) {
            e.bottom |= 0xFFU << i;
        } else {
            /* neither */
        }
        if (at == 0U) {
            e.left |= 1U << i;
        }
        if (at == (p->width - 1U) / 8U) {
            e.right |= 1U << (i + (p->width - 1U) % 8U);
        }
        at++;
        if (at == p->row_bytes) {
            at = 0U;
            row++;
        }
    }
    return e;
}

/* What the counters of every filter begin with. */
static void start_counters(const struct shoal_bit_convp *k, const struct edges *e,
                           uint32_t *counters)
{
    const uint32_t rows[3] = {e->top, ~(e->top | e->bottom), e->bottom};
    const uint32_t columns[3] = {e->left, ~(e->left | e->right), e->right & ~e->left};
    const uint32_t words = (uint32_t)k->pool.filters * k->counter_bits;
    uint32_t chosen[3][SHOAL_PATTERNS]; /* of a row, the pixels of each choice of columns */
    for (uint32_t row = 0U; row < 3U; row++) {
        chosen[row][0] = 0U;
        for (uint32_t column = 0U; column < 3U; column++) {
            const uint32_t where = rows[row] & columns[column];
            for (uint32_t i = 0U; i < (1U << column); i++) {
                chosen[row][(1U << column) + i] = chosen[row][i] | where;
            }
        }
    }
    for (uint32_t word = 0U; word < words; word++) {
        const uint32_t kinds = k->starts[word];
        counters[word] = chosen[0][kinds & 7U] | chosen[1][(kinds >> 3) & 7U] | chosen[2][kinds >> 6];
    }
}

/* sum + a + b of bits: the low bits stay in sum, the high ones are given. */
SHOAL_INLINE uint32_t add_two(uint32_t *sum, uint32_t a, uint32_t b)
{
    const uint32_t either = *sum ^ a;
    const uint32_t carry = (*sum & a) | (either & b);
    *sum = either ^ b;
    return carry;
}

SHOAL_INLINE uint32_t add_one(uint32_t *sum, uint32_t a)
{
    const uint32_t carry = *sum & a;
    *sum ^= a;
    return carry;
}

/* Low bits of a counter of 32 pixels. */
struct counter {
    uint32_t c0, c1, c2, c3;
};

/* What is carried from the low bits: two words of sixteens. */
struct carried {
    uint32_t a, b;
};

#if defined(__thumb2__) && defined(__GNUC__)

/* Carry in a, sum in place; lr is lost. */
#define SHOAL_ADD(sum, a, b)                                                                       \
    "eor lr, " sum ", " a "\n\t"                                                                   \
    "and " a ", " a ", " sum "\n\t"                                                                \
    "eor " sum ", lr, " b "\n\t"                                                                   \
    "and lr, lr, " b "\n\t"                                                                        \
    "orr " a ", " a ", lr\n\t"

#define SHOAL_HALF_ADD(carry, sum, a)                                                              \
    "and " carry ", " sum ", " a "\n\t"                                                            \
    "eor " sum ", " sum ", " a "\n\t"

#define SHOAL_LOOK_UP(low, high, at, offset)                                                       \
    "ubfx " low ", %[w], #" at ", #3\n\t"                                                          \
    "add " low ", %[tables], " low ", lsl #3\n\t"                                                  \
    "ldrd " low ", " high ", [" low ", #" offset "]\n\t"

/* The differing bits of two words each, added; the carry. */
#define SHOAL_DIFFER(carry)                                                                        \
    "ldrd r8, r9, [%[x]], #8\n\t"                                                                  \
    "ldrd r12, lr, [%[y]], #8\n\t"                                                                 \
    "eor r8, r8, r12\n\t"                                                                          \
    "eor r9, r9, lr\n\t"                                                                           \
    "eor lr, %[c0], r8\n\t"                                                                        \
    "and " carry ", %[c0], r8\n\t"                                                                 \
    "eor %[c0], lr, r9\n\t"                                                                        \
    "and lr, lr, r9\n\t"                                                                           \
    "orr " carry ", " carry ", lr\n\t"

/* Adds the matches of two channels. In assembly because it needs every register. */
SHOAL_INLINE struct carried add_pair(const struct matches *tables, const uint16_t *weights,
                                     struct counter *c)
{
    struct carried out;
    uint32_t w;
    memcpy(&w, weights, sizeof w);
    __asm__(SHOAL_LOOK_UP("%[a]", "%[b]", "0", "0") SHOAL_LOOK_UP("r8", "r9", "3", "64")
            SHOAL_ADD("%[c0]", "%[a]", "r8") SHOAL_ADD("%[c1]", "%[b]", "r9")
            SHOAL_LOOK_UP("r8", "r9", "6", "128") SHOAL_LOOK_UP("r10", "r11", "16", "192")
            SHOAL_ADD("%[c0]", "r8", "r10") SHOAL_ADD("%[c1]", "r9", "r11")
            SHOAL_ADD("%[c1]", "%[a]", "r8") SHOAL_ADD("%[c2]", "%[b]", "r9")
            SHOAL_LOOK_UP("r8", "r9", "19", "256") SHOAL_LOOK_UP("r10", "r11", "22", "320")
            SHOAL_ADD("%[c0]", "r8", "r10") SHOAL_ADD("%[c1]", "r9", "r11")
            SHOAL_ADD("%[c2]", "%[a]", "r9") SHOAL_HALF_ADD("r10", "%[c1]", "r8")
            SHOAL_ADD("%[c3]", "%[b]", "%[a]") SHOAL_HALF_ADD("r8", "%[c2]", "r10")
            SHOAL_HALF_ADD("%[a]", "%[c3]", "r8")
            : [c0] "+r"(c->c0), [c1] "+r"(c->c1), [c2] "+r"(c->c2), [c3] "+r"(c->c3),
              [a] "=&r"(out.a), [b] "=&r"(out.b)
            : [tables] "r"(tables), [w] "r"(w)
            : "r8", "r9", "r10", "r11", "lr", "memory");
    return out;
}

/* Adds in how many of eight words the bits differ; gives the carried eights. */
SHOAL_INLINE uint32_t add_eight(const uint32_t *a, const uint32_t *b, struct counter *c)
{
    uint32_t out;
    __asm__(SHOAL_DIFFER("%[out]") SHOAL_DIFFER("r10") SHOAL_ADD("%[c1]", "%[out]", "r10")
            SHOAL_DIFFER("r10") SHOAL_DIFFER("r11") SHOAL_ADD("%[c1]", "r10", "r11")
            SHOAL_ADD("%[c2]", "%[out]", "r10")
            : [c0] "+r"(c->c0), [c1] "+r"(c->c1), [c2] "+r"(c->c2), [out] "=&r"(out),
              [x] "+r"(a), [y] "+r"(b)
            :
            : "r8", "r9", "r10", "r11", "r12", "lr", "memory");
    return out;
}

#else

SHOAL_INLINE struct carried add_pair(const struct matches *tables, const uint16_t *weights,
                                     struct counter *c)
{
    struct carried out;
    const uint32_t w = weights[0];
    const uint32_t w2 = weights[1];
    const struct matches *a = &tables[w & 7U];
    const struct matches *b = &tables[8U + ((w >> 3) & 7U)];
    const uint32_t two0 = add_two(&c->c0, a->low, b->low);
    const uint32_t four0 = add_two(&c->c1, a->high, b->high);
    a = &tables[16U + ((w >> 6) & 7U)];
    b = &tables[24U + (w2 & 7U)];
    const uint32_t two1 = add_two(&c->c0, a->low, b->low);
    const uint32_t four1 = add_two(&c->c1, a->high, b->high);
    const uint32_t four2 = add_two(&c->c1, two0, two1);
    const uint32_t eight0 = add_two(&c->c2, four0, four1);
    a = &tables[32U + ((w2 >> 3) & 7U)];
    b = &tables[40U + ((w2 >> 6) & 7U)];
    const uint32_t two2 = add_two(&c->c0, a->low, b->low);
    const uint32_t four3 = add_two(&c->c1, a->high, b->high);
    const uint32_t eight1 = add_two(&c->c2, four2, four3);
    const uint32_t four4 = add_one(&c->c1, two2);
    out.b = add_two(&c->c3, eight0, eight1);
    const uint32_t eight2 = add_one(&c->c2, four4);
    out.a = add_one(&c->c3, eight2);
    return out;
}

SHOAL_INLINE uint32_t add_eight(const uint32_t *a, const uint32_t *b, struct counter *c)
{
    const uint32_t two0 = add_two(&c->c0, a[0] ^ b[0], a[1] ^ b[1]);
    const uint32_t two1 = add_two(&c->c0, a[2] ^ b[2], a[3] ^ b[3]);
    const uint32_t four0 = add_two(&c->c1, two0, two1);
    const uint32_t two2 = add_two(&c->c0, a[4] ^ b[4], a[5] ^ b[5]);
    const uint32_t two3 = add_two(&c->c0, a[6] ^ b[6], a[7] ^ b[7]);
    const uint32_t four1 = add_two(&c->c1, two2, two3);
    const uint32_t eight = add_two(&c->c2, four0, four1);
    return eight;
}

#endif

/* Adds the matches of `channels` channels to a counter, four at a time; tables and weights of the
 * last ones are filled up with zeros. */
static void add_matches(const struct matches *tables, const uint16_t *weights, uint32_t channels,
                        const uint32_t *from, uint32_t *to, uint32_t counter_bits)
{
    struct counter c = {from[0], from[1], from[2], from[3]};
    uint32_t c4 = from[4];
    uint32_t c5 = from[5];
    for (uint32_t bit = SHOAL_LOW_BITS; bit < counter_bits; bit++) {
        to[bit] = from[bit];
    }
    for (uint32_t channel = 0U; channel < channels; channel += 4U) {
        struct carried sixteens = add_pair(tables, weights, &c);
        const uint32_t first = add_two(&c4, sixteens.a, sixteens.b);
        sixteens = add_pair(tables + 6U * SHOAL_PATTERNS, weights + 2, &c);
        const uint32_t second = add_two(&c4, sixteens.a, sixteens.b);
        uint32_t carry = add_two(&c5, first, second);
        for (uint32_t bit = SHOAL_LOW_BITS; bit < counter_bits; bit++) {
            carry = add_one(&to[bit], carry);
        }
        tables += 12U * SHOAL_PATTERNS;
        weights += 4;
    }
    to[0] = c.c0;
    to[1] = c.c1;
    to[2] = c.c2;
    to[3] = c.c3;
    to[4] = c4;
    to[5] = c5;
}

void shoal_bit_convp(const struct shoal_bit_convp *k, const uint8_t *input, uint8_t *output,
                     void *scratch)
{
    const struct shoal_bit_pool *const p = &k->pool;
    const uint32_t words = (uint32_t)p->filters * k->counter_bits;
    const uint32_t weight_row = (k->channels + 3U) / 4U * 4U;
    struct matches *const tables = (struct matches *)scratch;
    uint32_t *const starts = (uint32_t *)(void *)(tables + 3U * SHOAL_PATTERNS * k->block);
    uint32_t *const counters = starts + words;
    uint8_t *const rings = (uint8_t *)(counters + words);
    const uint32_t bytes = (uint32_t)p->height * p->row_bytes;
    struct edges known = {1U, 0U, 0U, 0U}; /* no word has this */
    uint32_t next = 0U;
    memset(output, 0, p->out_bytes);
    for (uint32_t byte = 0U; byte < bytes; byte += 4U) {
        const struct edges e = edges_of(p, byte);
        if (memcmp(&e, &known, sizeof e) != 0) {
            start_counters(k, &e, starts);
            known = e;
        }
        for (uint32_t first = 0U; first < k->channels; first += k->block) {
            const uint32_t left = k->channels - first;
            const uint32_t channels = left < k->block ? left : k->block;
            const uint8_t *plane = input + first * k->in_plane + byte;
            struct matches *table = tables;
            for (uint32_t channel = 0U; channel < channels; channel++) {
                for (uint32_t row = 0U; row < 3U; row++) {
                    const uint8_t *const at = plane + row * p->row_bytes;
                    const uint32_t middle = load4(at + 1);
                    count_matches(((middle << 1) | ((uint32_t)at[0] >> 7)) & ~e.left, middle,
                                  ((middle >> 1) | ((uint32_t)at[5] << 31)) & ~e.right, table);
                    table += SHOAL_PATTERNS;
                }
                plane += k->in_plane;
            }
            memset(table, 0, (0U - channels) % 4U * 3U * SHOAL_PATTERNS * sizeof *table);
            const uint32_t *from = first == 0U ? starts : counters;
            uint32_t *to = counters;
            const uint16_t *weights = k->weights + first;
            for (uint32_t f = 0U; f < p->filters; f++) {
                add_matches(tables, weights, channels, from, to, k->counter_bits);
                weights += weight_row;
                from += k->counter_bits;
                to += k->counter_bits;
            }
        }
        uint8_t *ring = rings + byte % p->ring_bytes;
        for (uint32_t f = 0U; f < p->filters; f++) {
            const uint32_t bits = counters[f * k->counter_bits + k->counter_bits - 1U];
            memcpy(ring, &bits, sizeof bits);
            ring += p->ring_bytes;
        }
        const uint32_t rows = (byte + 4U) / p->row_bytes;
        pool_rows(p, rings, rows < p->height ? rows : p->height, &next, output);
    }
}

/* ---- products of bits ----------------------------------------------------------------------- */

static inline uint32_t ones_in(uint32_t x)
{
    x -= (x >> 1) & 0x55555555U;
    x = (x & 0x33333333U) + ((x >> 2) & 0x33333333U);
    x = (x + (x >> 4)) & 0x0F0F0F0FU;
    return (x * 0x01010101U) >> 24;
}

/* Ones, each word's worth twice that of the one before. */
static uint32_t weighed_ones(const struct counter *c)
{
    const uint32_t pairs = 0x33333333U;
    const uint32_t a = c->c0 - ((c->c0 >> 1) & 0x55555555U);
    const uint32_t b = c->c1 - ((c->c1 >> 1) & 0x55555555U);
    const uint32_t d = c->c2 - ((c->c2 >> 1) & 0x55555555U);
    const uint32_t e = c->c3 - ((c->c3 >> 1) & 0x55555555U);
    /* In four bits at most 12, in eight 24 and then 120. */
    const uint32_t low = (a & pairs) + ((a >> 2) & pairs) +
                         2U * ((b & pairs) + ((b >> 2) & pairs));
    const uint32_t high = (d & pairs) + ((d >> 2) & pairs) +
                          2U * ((e & pairs) + ((e >> 2) & pairs));
    const uint32_t bytes = (low & 0x0F0F0F0FU) + ((low >> 4) & 0x0F0F0F0FU) +
                           4U * ((high & 0x0F0F0F0FU) + ((high >> 4) & 0x0F0F0F0FU));
    const uint32_t halves = (bytes & 0xFF00FFU) + ((bytes >> 8) & 0xFF00FFU);
    return (halves & 0xFFFFU) + (halves >> 16);
}

/* In how many bits words differ: counted in words of ones, twos, fours and eights. */
static uint32_t differing(const uint32_t *a, const uint32_t *b, uint32_t words)
{
    struct counter c = {0U, 0U, 0U, 0U};
    uint32_t count = 0U;
    for (; words >= 16U; words -= 16U) {
        const uint32_t first = add_eight(a, b, &c);
        const uint32_t second = add_eight(a + 8, b + 8, &c);
        const uint32_t sixteens = add_two(&c.c3, first, second);
        count += ones_in(sixteens);
        a += 16;
        b += 16;
    }
    count = 16U * count + weighed_ones(&c);
    for (; words != 0U; words--) {
        count += ones_in(*a ^ *b);
        a++;
        b++;
    }
    return count;
}

void shoal_bit_fc(const struct shoal_bit_fc *k, const uint32_t *input, uint32_t *output)
{
    const uint32_t *weights = k->weights;
    uint32_t word = 0U;
    for (uint32_t unit = 0U; unit < k->units; unit++) {
        if ((int32_t)differing(input, weights, k->words) <= k->limits[unit]) {
            word |= 1U << (unit % 32U);
        }
        weights += k->words;
        if ((unit % 32U == 31U) || (unit + 1U == k->units)) {
            output[unit / 32U] = word;
            word = 0U;
        }
    }
}

void shoal_bit_exit(const struct shoal_bit_exit *k, const uint32_t *input, int8_t *output)
{
    const uint32_t *weights = k->weights;
    for (uint32_t class = 0U; class < k->classes; class++) {
        const int32_t dot =
            (int32_t)k->inputs - 2 * (int32_t)differing(input, weights, k->words);
        const int32_t doubled = 2 * dot + k->offsets[class];
        const int32_t score = (doubled + (1 << (k->shift - 1U))) >> k->shift;
        output[class] = (int8_t)(score < -128 ? -128 : (score > 127 ? 127 : score));
        weights += k->words;
    }
}

/* ---- bits as they travel -------------------------------------------------------------------- */

/* Bit i of a byte as bit 4 * i. */
static uint32_t every_fourth(uint32_t x)
{
    x = (x | (x << 12)) & 0x000F000FU;
    x = (x | (x << 6)) & 0x03030303U;
    return (x | (x << 3)) & 0x11111111U;
}

static uint32_t bits_reversed(uint32_t x)
{
    x = ((x >> 1) & 0x55555555U) | ((x & 0x55555555U) << 1);
    x = ((x >> 2) & 0x33333333U) | ((x & 0x33333333U) << 2);
    return ((x >> 4) & 0x0F0F0F0FU) | ((x & 0x0F0F0F0FU) << 4);
}

/* Whole bytes of four channels. */
static void four_channels_out(const struct shoal_bit_map *k, const uint8_t *planes,
                              uint8_t *output)
{
    for (uint32_t byte = 0U; byte < (uint32_t)k->height * k->row_bytes; byte++) {
        const uint8_t *const at = planes + k->first + byte;
        const uint32_t word = every_fourth(at[0]) | (every_fourth(at[k->plane]) << 1) |
                              (every_fourth(at[2U * k->plane]) << 2) |
                              (every_fourth(at[3U * k->plane]) << 3);
        store_bytes(output, bits_reversed(word), 4U);
        output += 4;
    }
}

void shoal_bits_out(const struct shoal_bit_map *k, const uint8_t *planes, uint8_t *output)
{
    uint32_t bits = 1U; /* the one tells how many there are */
    if ((k->channels == 4U) && (k->width % 8U == 0U)) {
        four_channels_out(k, planes, output);
        return;
    }
    for (uint32_t y = 0U; y < k->height; y++) {
        const uint8_t *const row = planes + k->first + y * k->row_bytes;
        for (uint32_t x = 0U; x < k->width; x++) {
            const uint8_t *at = row + x / 8U;
            for (uint32_t c = 0U; c < k->channels; c++) {
                bits = (bits << 1) | (((uint32_t)*at >> (x % 8U)) & 1U);
                at += k->plane;
                if (bits >= 256U) {
                    *output = (uint8_t)bits;
                    output++;
                    bits = 1U;
                }
            }
        }
    }
    if (bits != 1U) {
        while (bits < 256U) {
            bits <<= 1;
        }
        *output = (uint8_t)bits;
    }
}

void shoal_bits_wide(const struct shoal_bit_map *k, const uint8_t *planes, int8_t *output)
{
    for (uint32_t y = 0U; y < k->height; y++) {
        const uint8_t *const row = planes + k->first + y * k->row_bytes;
        for (uint32_t x = 0U; x < k->width; x++) {
            const uint8_t *at = row + x / 8U;
            for (uint32_t c = 0U; c < k->channels; c++) {
                const int32_t bit = (int32_t)(((uint32_t)*at >> (x % 8U)) & 1U);
                *output = (int8_t)(2 * bit - 1);
                output++;
                at += k->plane;
            }
        }
    }
}

/* Bits 0, 4, 8 .. as bits 0, 1, 2 .. */
static uint32_t fourth_bits(uint32_t x)
{
    x &= 0x11111111U;
    x = (x | (x >> 3)) & 0x03030303U;
    x = (x | (x >> 6)) & 0x000F000FU;
    return (x | (x >> 12)) & 0xFFU;
}

/* Eight pixels of four channels at a time; rows are whole bytes. */
static void four_channels_in(const struct shoal_bit_map *k, const uint8_t *input, uint8_t *planes)
{
    const uint32_t quads = k->channels / 4U;
    const uint32_t plane = k->plane;
    const uint32_t bytes = (uint32_t)k->height * k->row_bytes;
    for (uint32_t byte = 0U; byte < bytes; byte++) {
        for (uint32_t quad = 0U; quad < quads; quad++) {
            uint32_t half = byte * 8U * quads + quad; /* of a byte, the higher one first */
            uint32_t word = 0U;
            for (uint32_t i = 0U; i < 32U; i += 4U) {
                const uint32_t two = input[half / 2U];
                word |= ((half % 2U) == 0U ? two >> 4 : two & 15U) << i;
                half += quads;
            }
            uint8_t *const at = planes + k->first + byte + quad * 4U * plane;
            at[0] = (uint8_t)fourth_bits(word >> 3);
            at[plane] = (uint8_t)fourth_bits(word >> 2);
            at[2U * plane] = (uint8_t)fourth_bits(word >> 1);
            at[3U * plane] = (uint8_t)fourth_bits(word);
        }
    }
}

void shoal_bits_in(const struct shoal_bit_map *k, const uint8_t *input, uint8_t *planes)
{
    uint32_t left = 0U; /* bits of the byte that were not taken yet */
    uint32_t bits = 0U;
    memset(planes, 0, k->bytes);
    if ((k->channels % 4U == 0U) && (k->width % 8U == 0U)) {
        four_channels_in(k, input, planes);
        return;
    }
    for (uint32_t y = 0U; y < k->height; y++) {
        uint8_t *const row = planes + k->first + y * k->row_bytes;
        for (uint32_t x = 0U; x < k->width; x++) {
            uint8_t *at = row + x / 8U;
            for (uint32_t c = 0U; c < k->channels; c++) {
                if (left == 0U) {
                    bits = *input;
                    input++;
                    left = 8U;
                }
                left--;
                *at = (uint8_t)(*at | (((bits >> left) & 1U) << (x % 8U)));
                at += k->plane;
            }
        }
    }
}
