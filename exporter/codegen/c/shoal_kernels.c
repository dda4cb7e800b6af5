#include "shoal_kernels.h"

#include <string.h>

#if defined(SHOAL_MVE)
#include <arm_mve.h>
#endif

/* ---- fixed point ---------------------------------------------------------------------------- */

/* a * b / 2^31 to nearest, halves up; both are never INT32_MIN at once. */
static inline int32_t high_product(int32_t a, int32_t b)
{
    return (int32_t)(((int64_t)a * b + (1LL << 30)) >> 31);
}

/* value / 2^bits to nearest, halves away from zero. */
static inline int32_t shift_right(int32_t value, uint32_t bits)
{
    if (bits == 0U) {
        return value;
    }
    return (int32_t)(((int64_t)value + (1LL << (bits - 1U)) - (value < 0 ? 1 : 0)) >> bits);
}

/* One less where negative: a right shift after adding half then rounds halves away from zero. */
static inline int32_t less_if_negative(int32_t value)
{
    return value - (int32_t)((uint32_t)value >> 31);
}

/* value * 2^bits as a register keeps it. */
static inline int32_t shift_left(int32_t value, uint32_t bits)
{
    return (int32_t)((uint32_t)value << bits);
}

static inline int32_t clamped(int32_t value, int32_t low, int32_t high)
{
    if (value < low) {
        return low;
    }
    return value > high ? high : value;
}

/* ---- what the processor offers -------------------------------------------------------------- */

#if defined(__ARM_FEATURE_DSP) && (__ARM_FEATURE_DSP == 1) && defined(__GNUC__)
#define SHOAL_DSP 1

/* (int16)a_low * b_low + (int16)a_high * b_high + sum */
static inline int32_t multiply_pairs(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t result;
    __asm__("smlad %0, %1, %2, %3" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

static inline int32_t multiply_low(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t result;
    __asm__("smlabb %0, %1, %2, %3" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

static inline int32_t multiply_high(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t result;
    __asm__("smlatt %0, %1, %2, %3" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

/* Bytes 0 and 2, sign-extended, plus pair. */
static inline uint32_t widen_even(uint32_t pair, uint32_t bytes)
{
    uint32_t result;
    __asm__("sxtab16 %0, %1, %2" : "=r"(result) : "r"(pair), "r"(bytes));
    return result;
}

/* Bytes 1 and 3, sign-extended, plus pair. */
static inline uint32_t widen_odd(uint32_t pair, uint32_t bytes)
{
    uint32_t result;
    __asm__("sxtab16 %0, %1, %2, ror #8" : "=r"(result) : "r"(pair), "r"(bytes));
    return result;
}

static inline uint32_t low_halves(uint32_t a, uint32_t b)
{
    uint32_t result;
    __asm__("pkhbt %0, %1, %2, lsl #16" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

static inline uint32_t high_halves(uint32_t a, uint32_t b)
{
    uint32_t result;
    __asm__("pkhtb %0, %1, %2, asr #16" : "=r"(result) : "r"(b), "r"(a));
    return result;
}

static inline int32_t saturated8(int32_t value)
{
    int32_t result;
    __asm__("ssat %0, #8, %1" : "=r"(result) : "r"(value));
    return result;
}

static inline uint32_t load4(const void *from)
{
    uint32_t word;
    memcpy(&word, from, sizeof word);
    return word;
}

static inline void store4(void *to, uint32_t word)
{
    memcpy(to, &word, sizeof word);
}

/* The high word of 2 * a * b, rounded: high_product where 2 * a fits. `a` comes doubled. */
static inline int32_t high_product_doubled(int32_t a, int32_t b)
{
    int32_t result;
    __asm__("smmulr %0, %1, %2" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

#else

/* As above. */
static inline int32_t high_product_doubled(int32_t a, int32_t b)
{
    return (int32_t)(((int64_t)a * b + (1LL << 31)) >> 32);
}

static inline int32_t saturated8(int32_t value)
{
    return clamped(value, -128, 127);
}

#endif

/* A sum as an output byte, before the clamp to low..high. */
static inline int32_t fast_output(const struct shoal_channel *c, int32_t sum)
{
    const int32_t t = high_product_doubled(shift_left(sum, c->doubled), c->multiplier);
    return saturated8((less_if_negative(t) + c->rounding) >> c->right);
}

static int32_t slow_output(const struct shoal_channel *c, int32_t sum, int32_t zero)
{
    const int32_t t = high_product(shift_left(sum, c->left), c->multiplier);
    return clamped(shift_right(t, c->right) + zero, -128, 127);
}

#if defined(__GNUC__)
#define SHOAL_BARRIER __asm__ volatile("" ::: "memory")
#define SHOAL_APART __attribute__((noinline)) /* where registers are too few for what is around */
#else
#define SHOAL_BARRIER ((void)0)
#define SHOAL_APART
#endif

struct output {
    int32_t zero, low, high;
    uint32_t fast, full; /* full: low..high is all of int8 */
};

static inline int8_t output_byte(const struct output *o, const struct shoal_channel *c, int32_t sum)
{
    int32_t value = o->fast != 0U ? fast_output(c, sum) : slow_output(c, sum, o->zero);
    if (o->full == 0U) {
        value = clamped(value, o->low, o->high);
    }
    return (int8_t)value;
}

/* ---- the ring of widened rows --------------------------------------------------------------- */

#if !defined(SHOAL_MVE)

/* count bytes less zero, as int16. */
static void widen(const int8_t *from, int16_t *to, uint32_t count, int32_t zero)
{
    uint32_t i = 0U;
#if defined(SHOAL_DSP)
    const uint32_t offset = ((uint32_t)-zero & 0xFFFFU) * 0x10001U;
    for (; i + 4U <= count; i += 4U) {
        const uint32_t bytes = load4(from + i);
        const uint32_t even = widen_even(offset, bytes);
        const uint32_t odd = widen_odd(offset, bytes);
        store4(to + i, low_halves(even, odd));
        store4(to + i + 2U, high_halves(even, odd));
    }
#endif
    for (; i < count; i++) {
        to[i] = (int16_t)(from[i] - zero);
    }
}

struct ring {
    int16_t *rows;
    uint32_t row_count, row;         /* rows; int16 in a row */
    uint32_t columns, pixel;         /* pixels that are read; int16 in one */
    uint32_t pad_top, pad_left;
    uint32_t in_height, in_width, in_channels;
    uint32_t groups, group_channels, group_pixel;
    int32_t zero;
    uint32_t next;                   /* first padded row that was not read yet */
};

/* Where the padded row is kept. Rows count from the top of the padding. */
static inline int16_t *ring_row(const struct ring *r, uint32_t padded_row)
{
    return r->rows + (padded_row % r->row_count) * r->row;
}

static void ring_read(struct ring *r, const int8_t *input, uint32_t padded_row)
{
    int16_t *to = ring_row(r, padded_row);
    if ((padded_row < r->pad_top) || (padded_row - r->pad_top >= r->in_height)) {
        memset(to, 0, r->row * sizeof *to);
        return;
    }
    const int8_t *from = input + (padded_row - r->pad_top) * r->in_width * r->in_channels;
    const uint32_t room = r->columns > r->pad_left ? r->columns - r->pad_left : 0U;
    const uint32_t width = r->in_width < room ? r->in_width : room;
    const uint32_t before = r->pad_left * r->pixel;
    const uint32_t inside = width * r->pixel;
    memset(to, 0, before * sizeof *to);
    if (r->pixel == r->in_channels) {
        widen(from, to + before, inside, r->zero);
    } else {
        int16_t *at = to + before;
        for (uint32_t i = 0U; i < width * r->groups; i++) {
            widen(from, at, r->group_channels, r->zero);
            from += r->group_channels;
            at += r->group_pixel;
            at[-1] = 0; /* groups are padded to an even number */
        }
    }
    memset(to + before + inside, 0, (r->row - before - inside) * sizeof *to);
}

/* Reads rows first .. first + count - 1 as far as they were not read before. */
static void ring_fill(struct ring *r, const int8_t *input, uint32_t first, uint32_t count)
{
    if (r->next < first) {
        r->next = first;
    }
    for (; r->next < first + count; r->next++) {
        ring_read(r, input, r->next);
    }
}

#endif

/* ---- convolutions --------------------------------------------------------------------------- */

#if defined(SHOAL_DSP)

#define SHOAL_OUTPUT(sum)                                                                          \
    "lsl " sum ", " sum ", r10\n\t"                                                                \
    "smmulr " sum ", " sum ", r8\n\t"                                                              \
    "add " sum ", " sum ", " sum ", asr #31\n\t"                                                   \
    "add " sum ", " sum ", r9\n\t"                                                                 \
    "asr " sum ", " sum ", r11\n\t"                                                                \
    "ssat " sum ", #8, " sum "\n\t"

#endif

/* Halves of bytes in words, as bytes with their sign. */
static inline uint32_t signed_halves(uint32_t halves)
{
    const uint32_t shifted = (halves & 0x0F0F0F0FU) ^ 0x08080808U;
    return ((shifted | 0x80808080U) - 0x08080808U) ^ 0x80808080U;
}

/* A pair's weights as bytes, `bytes` of them. */
static void unpack_int4(const int8_t *from, int8_t *to, uint32_t bytes)
{
    for (; bytes != 0U; bytes -= 8U) {
        uint32_t word;
        memcpy(&word, from, sizeof word);
        const uint32_t first = signed_halves(word);
        const uint32_t second = signed_halves(word >> 4);
        memcpy(to, &first, sizeof first);
        memcpy(to + 4, &second, sizeof second);
        from += 4;
        to += 8;
    }
}

#if defined(SHOAL_MVE)

/* Factors of two channels, twice: those of four sums, and where their bytes go. */
struct four_outputs {
    int32x4_t left, multiplier, rounding, right;
    uint32x4_t places;
    int32_t low, high;
};

static struct four_outputs four_outputs_of(const struct shoal_channel *c, const struct output *o,
                                           uint32_t pitch)
{
    const int32_t left[4] = {c[0].left, c[1].left, c[0].left, c[1].left};
    const int32_t multiplier[4] = {c[0].multiplier, c[1].multiplier, c[0].multiplier,
                                   c[1].multiplier};
    const int32_t rounding[4] = {c[0].rounding, c[1].rounding, c[0].rounding, c[1].rounding};
    const int32_t right[4] = {-c[0].right, -c[1].right, -c[0].right, -c[1].right};
    const uint32_t places[4] = {0U, 1U, pitch, pitch + 1U};
    const struct four_outputs f = {vld1q_s32(left),  vld1q_s32(multiplier), vld1q_s32(rounding),
                                   vld1q_s32(right), vld1q_u32(places),     o->low,
                                   o->high};
    return f;
}

/* Of pixel and channel. */
struct sums {
    int32_t of00, of01, of10, of11;
};

/* As fast_output, four at once. */
static inline void store_four(const struct four_outputs *f, const struct sums *s, int8_t *to)
{
    const int32_t sums[4] = {s->of00, s->of01, s->of10, s->of11};
    const int32x4_t t = vqrdmulhq_s32(vshlq_s32(vld1q_s32(sums), f->left), f->multiplier);
    const int32x4_t rounded = vaddq_s32(vaddq_s32(t, vshrq_n_s32(t, 31)), f->rounding);
    const int32x4_t value = vshlq_s32(rounded, f->right);
    const int32x4_t inside = vminq_s32(vmaxq_s32(value, vdupq_n_s32(f->low)),
                                       vdupq_n_s32(f->high));
    vstrbq_scatter_offset_s32(to, f->places, inside);
}

/* A stretch of two pixels times two channels. In assembly for the loop whose last turn leaves out
 * what is beyond `bytes`. */
static inline void dot_two_by_two(const int8_t *x0, const int8_t *x1, const int8_t *w0,
                                  const int8_t *w1, uint32_t bytes, struct sums *sums)
{
    __asm__("wlstp.8 lr, %[bytes], 2f\n\t"
            "1:\n\t"
            "vldrb.8 q0, [%[x0]], #16\n\t"
            "vldrb.8 q1, [%[w0]], #16\n\t"
            "vmladava.s8 %[sum00], q0, q1\n\t"
            "vldrb.8 q2, [%[x1]], #16\n\t"
            "vmladava.s8 %[sum10], q2, q1\n\t"
            "vldrb.8 q3, [%[w1]], #16\n\t"
            "vmladava.s8 %[sum01], q0, q3\n\t"
            "vmladava.s8 %[sum11], q2, q3\n\t"
            "letp lr, 1b\n\t"
            "2:\n\t"
            : [sum00] "+Te"(sums->of00), [sum01] "+Te"(sums->of01), [sum10] "+Te"(sums->of10),
              [sum11] "+Te"(sums->of11), [x0] "+r"(x0), [x1] "+r"(x1), [w0] "+r"(w0), [w1] "+r"(w1)
            : [bytes] "r"(bytes)
            : "q0", "q1", "q2", "q3", "lr", "cc", "memory");
}

/* A stretch of one pixel times two channels. */
static inline void dot_one_by_two(const int8_t *x, const int8_t *w0, const int8_t *w1,
                                  uint32_t bytes, int32_t *sums)
{
    int32_t sum0 = sums[0];
    int32_t sum1 = sums[1];
    __asm__("wlstp.8 lr, %[bytes], 2f\n\t"
            "1:\n\t"
            "vldrb.8 q0, [%[x]], #16\n\t"
            "vldrb.8 q1, [%[w0]], #16\n\t"
            "vmladava.s8 %[sum0], q0, q1\n\t"
            "vldrb.8 q2, [%[w1]], #16\n\t"
            "vmladava.s8 %[sum1], q0, q2\n\t"
            "letp lr, 1b\n\t"
            "2:\n\t"
            : [sum0] "+Te"(sum0), [sum1] "+Te"(sum1), [x] "+r"(x), [w0] "+r"(w0), [w1] "+r"(w1)
            : [bytes] "r"(bytes)
            : "q0", "q1", "q2", "lr", "cc", "memory");
    sums[0] = sum0;
    sums[1] = sum1;
}

#else

/* What the inner loops need of a convolution. */
struct dots {
    const int16_t *const *segments; /* a pointer into the ring for each stretch */
    uint32_t segment_count;
    uint32_t bytes;      /* of a stretch of widened weights of a pair: 16 a quad */
    uint32_t step_bytes; /* from a pixel to the next */
};

#if defined(SHOAL_DSP)

/* Bytes in the order 0, 2, 1, 3 to int16 in the order 0, 1, 2, 3; count is a multiple of 8. */
static void widen_weights(const int8_t *from, int16_t *to, uint32_t count)
{
    const int8_t *const end = from + count;
    __asm__ volatile("1:\n\t"
                     "ldrd r4, r5, [%0], #8\n\t"
                     "sxtb16 r2, r4\n\t"
                     "sxtb16 r3, r4, ror #8\n\t"
                     "sxtb16 r4, r5\n\t"
                     "sxtb16 r5, r5, ror #8\n\t"
                     "stmia %1!, {r2, r3, r4, r5}\n\t"
                     "cmp %0, %2\n\t"
                     "bne 1b\n\t"
                     : "+r"(from), "+r"(to)
                     : "r"(end)
                     : "r2", "r3", "r4", "r5", "cc", "memory");
}

#define SHOAL_QUAD                                                                                 \
    "ldmia r0!, {r8, r9, r10, r11}\n\t"                                                            \
    "ldrd r12, lr, [r1], #8\n\t"                                                                   \
    "smlad r4, r8, r12, r4\n\t"                                                                    \
    "smlad r5, r10, r12, r5\n\t"                                                                   \
    "smlad r4, r9, lr, r4\n\t"                                                                     \
    "smlad r5, r11, lr, r5\n\t"                                                                    \
    "ldrd r12, lr, [r2], #8\n\t"                                                                   \
    "smlad r6, r8, r12, r6\n\t"                                                                    \
    "smlad r7, r10, r12, r7\n\t"                                                                   \
    "smlad r6, r9, lr, r6\n\t"                                                                     \
    "smlad r7, r11, lr, r7\n\t"

/* What SHOAL_OUTPUT takes of a channel. */
struct factors {
    int32_t multiplier, rounding;
    uint32_t doubled, right;
};

/* A row of two output channels as the assembly reads it, by offset; it counts `to` and `blocks`. */
struct row_job {
    struct factors factors[2];
    int32_t biases[2];
    const int16_t *weights;
    int8_t *to;
    uint32_t blocks; /* of two pixels, at least one */
    uint32_t pitch;  /* output channels */
    uint32_t byte;   /* of the group in a pixel */
    uint32_t bytes;  /* of a stretch of widened weights of a pair: 16 a quad */
    uint32_t step_bytes; /* from a pixel to the next */
    uint32_t skip;   /* bytes of code: quads that the first turn of four leaves out, 44 each */
    const int16_t *const *segments;
    const int16_t *const *segments_end;
};

/* Blocks of two pixels times two channels, for fast layers; clamped to int8 only. In
 * assembly because the inner loop needs every register: r0 weights, r1 and r2 pixels, r3 end of
 * the stretch, r4..r7 sums of both channels at pixel 0, then at pixel 1; r8..r12 and lr values.
 * On the stack: byte, bytes, step, where a stretch's code begins, segment, their end, job. */
__attribute__((naked, noinline)) static void fast_row(struct row_job *job __attribute__((unused)))
{
    __asm__ volatile("push {r4, r5, r6, r7, r8, r9, r10, r11, lr}\n\t"
                     "sub sp, sp, #28\n\t"
                     "mov r12, r0\n\t"
                     "add r0, r0, #56\n\t"
                     "ldmia r0, {r4, r5, r6, r7, r8, r9}\n\t"
                     "adr.w r1, 3f\n\t"
                     "add r7, r7, r1\n\t"
                     "orr r7, r7, #1\n\t"
                     "mov r10, r12\n\t"
                     "stmia sp, {r4, r5, r6, r7, r8, r9, r10}\n\t"
                     "1:\n\t"
                     "ldr r8, [r12, #72]\n\t"
                     "str r8, [sp, #16]\n\t"
                     "ldrd r4, r5, [r12, #32]\n\t"
                     "ldr r0, [r12, #40]\n\t"
                     "mov r6, r4\n\t"
                     "mov r7, r5\n\t"
                     "2:\n\t"
                     "ldmia sp, {r1, r8, r9, r10, r11}\n\t"
                     "ldr r12, [r11], #4\n\t"
                     "str r11, [sp, #16]\n\t"
                     "add r1, r1, r12\n\t"
                     "add r2, r1, r9\n\t"
                     "add r3, r0, r8\n\t"
                     "bx r10\n\t"
                     ".balign 4\n\t"
                     "3:\n\t"
                     SHOAL_QUAD
                     SHOAL_QUAD
                     SHOAL_QUAD
                     SHOAL_QUAD
                     "cmp r0, r3\n\t"
                     "bne 3b\n\t"
                     "ldrd r8, r9, [sp, #16]\n\t"
                     "cmp r8, r9\n\t"
                     "bne 2b\n\t"
                     "ldr r12, [sp, #24]\n\t"
                     "ldmia r12, {r8, r9, r10, r11}\n\t"
                     SHOAL_OUTPUT("r4")
                     SHOAL_OUTPUT("r6")
                     "ldrd r8, r9, [r12, #16]\n\t"
                     "ldrd r10, r11, [r12, #24]\n\t"
                     SHOAL_OUTPUT("r5")
                     SHOAL_OUTPUT("r7")
                     "ldrd r1, r2, [r12, #44]\n\t"
                     "ldr r3, [r12, #52]\n\t"
                     "strb r4, [r1]\n\t"
                     "strb r5, [r1, #1]\n\t"
                     "add r1, r1, r3\n\t"
                     "strb r6, [r1]\n\t"
                     "strb r7, [r1, #1]\n\t"
                     "add r1, r1, r3\n\t"
                     "ldr r4, [sp]\n\t"
                     "ldr r5, [sp, #8]\n\t"
                     "add r4, r4, r5, lsl #1\n\t"
                     "str r4, [sp]\n\t"
                     "subs r2, r2, #1\n\t"
                     "strd r1, r2, [r12, #44]\n\t"
                     "bne 1b\n\t"
                     "add sp, sp, #28\n\t"
                     "pop {r4, r5, r6, r7, r8, r9, r10, r11, pc}\n\t");
}

/* One pixel times two channels of packed weights. */
static void dot_one_by_two(const int8_t *weights, const struct dots *d, uint32_t first_byte,
                           int32_t *sums)
{
    int32_t sum0 = sums[0];
    int32_t sum1 = sums[1];
    for (uint32_t s = 0U; s < d->segment_count; s++) {
        const uint8_t *x = (const uint8_t *)d->segments[s] + first_byte;
        const int8_t *const end = weights + d->bytes / 2U;
        __asm__ volatile("1:\n\t"
                         "ldrd r2, r3, [%0], #8\n\t"
                         "ldrd r4, r5, [%1], #8\n\t"
                         "sxtb16 r6, r2\n\t"
                         "sxtb16 r2, r2, ror #8\n\t"
                         "smlad %2, r6, r4, %2\n\t"
                         "sxtb16 r6, r3\n\t"
                         "smlad %2, r2, r5, %2\n\t"
                         "sxtb16 r3, r3, ror #8\n\t"
                         "smlad %3, r6, r4, %3\n\t"
                         "cmp %0, %4\n\t"
                         "smlad %3, r3, r5, %3\n\t"
                         "bne 1b\n\t"
                         : "+r"(weights), "+r"(x), "+r"(sum0), "+r"(sum1)
                         : "r"(end)
                         : "r2", "r3", "r4", "r5", "r6", "cc", "memory");
    }
    sums[0] = sum0;
    sums[1] = sum1;
}

#else

/* One value of each pixel times its weight of each channel. The barrier keeps the compiler from
 * loading more at once than there are registers. */
#define SHOAL_STEP(weight, value)                                                                  \
    {                                                                                              \
        const int32_t first = x0[value];                                                           \
        const int32_t second = x1[value];                                                          \
        const int32_t w0 = weights[weight];                                                        \
        const int32_t w1 = weights[4 + (weight)];                                                  \
        sum00 += w0 * first;                                                                       \
        sum01 += w1 * first;                                                                       \
        sum10 += w0 * second;                                                                      \
        sum11 += w1 * second;                                                                      \
        SHOAL_BARRIER;                                                                             \
    }

/* Two pixels times two channels of packed weights. sums: of both channels at pixel 0, then 1. */
static void dot_two_by_two(const int8_t *weights, const struct dots *d, uint32_t first_byte,
                           int32_t *sums)
{
    int32_t sum00 = sums[0];
    int32_t sum01 = sums[1];
    int32_t sum10 = sums[2];
    int32_t sum11 = sums[3];
    for (uint32_t s = 0U; s < d->segment_count; s++) {
        const int16_t *x0 = d->segments[s] + first_byte / 2U;
        const int16_t *x1 = x0 + d->step_bytes / 2U;
        const int8_t *const end = weights + d->bytes / 2U;
        for (; weights != end; weights += 8, x0 += 4, x1 += 4) {
            SHOAL_STEP(0, 0)
            SHOAL_STEP(2, 1)
            SHOAL_STEP(1, 2)
            SHOAL_STEP(3, 3)
        }
    }
    sums[0] = sum00;
    sums[1] = sum01;
    sums[2] = sum10;
    sums[3] = sum11;
}

/* One pixel times two channels of packed weights. */
static void dot_one_by_two(const int8_t *weights, const struct dots *d, uint32_t first_byte,
                           int32_t *sums)
{
    int32_t sum0 = sums[0];
    int32_t sum1 = sums[1];
    for (uint32_t s = 0U; s < d->segment_count; s++) {
        const int16_t *x = d->segments[s] + first_byte / 2U;
        const int8_t *const end = weights + d->bytes / 2U;
        for (; weights != end; weights += 8, x += 4) {
            sum0 += weights[0] * x[0] + weights[2] * x[1] + weights[1] * x[2] + weights[3] * x[3];
            sum1 += weights[4] * x[0] + weights[6] * x[1] + weights[5] * x[2] + weights[7] * x[3];
        }
    }
    sums[0] = sum0;
    sums[1] = sum1;
}

#endif

#endif /* SHOAL_MVE */

static struct output output_of(int32_t zero, int32_t low, int32_t high, uint8_t fast)
{
    const struct output o = {zero, low, high, fast, ((low == -128) && (high == 127)) ? 1U : 0U};
    return o;
}

#if defined(SHOAL_DSP)

/* Clamps two channels of a row that was computed for all of int8. */
static inline void clamp_pair(const struct output *o, int8_t *to, uint32_t pitch, uint32_t pixels)
{
    if (o->full == 0U) {
        for (uint32_t x = 0U; x < pixels; x++) {
            to[x * pitch] = (int8_t)clamped(to[x * pitch], o->low, o->high);
            to[x * pitch + 1U] = (int8_t)clamped(to[x * pitch + 1U], o->low, o->high);
        }
    }
}

#endif

#if defined(SHOAL_MVE)

/* A row of bytes as the input stores them; beyond it, and between groups, is its zero point. */
static void byte_row(const struct shoal_conv *k, const int8_t *input, uint32_t padded_row,
                     int8_t *to)
{
    memset(to, k->in_zero, k->ring_row);
    if ((padded_row < k->pad_top) || (padded_row - k->pad_top >= k->in_height)) {
        return;
    }
    const int8_t *from = input + (padded_row - k->pad_top) * k->in_width * k->in_channels;
    const uint32_t columns = k->ring_columns;
    const uint32_t room = columns > k->pad_left ? columns - k->pad_left : 0U;
    const uint32_t width = k->in_width < room ? k->in_width : room;
    to += k->pad_left * k->pixel;
    if (k->pixel == k->in_channels) {
        memcpy(to, from, width * k->pixel);
        return;
    }
    for (uint32_t i = 0U; i < width * k->groups; i++) {
        for (uint32_t c = 0U; c < k->group_channels; c++) {
            to[c] = from[c];
        }
        from += k->group_channels;
        to += k->group_pixel;
    }
}

/* One row of one pair of output channels. outputs: 2, or 1 where the second is padding. Inline, so
 * that what the compiler knows of `o` is decided once. */
static inline __attribute__((always_inline)) void
conv_row(const struct shoal_conv *k, const int8_t *const *segments, const struct output *o,
         const int8_t *weights, const struct shoal_channel *channels, uint32_t group, int8_t *to,
         uint32_t outputs)
{
    const struct shoal_channel c[2] = {channels[0], channels[1]};
    const uint32_t count = (uint32_t)k->kernel_height * k->row_segments;
    const uint32_t bytes = k->quads * 4U;
    const uint32_t step = (uint32_t)k->stride_x * k->pixel;
    const uint32_t pitch = k->out_channels;
    const uint32_t width = k->out_width;
    const int8_t *const second = weights + count * bytes;
    const struct four_outputs four = four_outputs_of(c, o, pitch);
    uint32_t at = group;
    uint32_t x = 0U;
    for (; x + 2U <= width; x += 2U) {
        struct sums sums = {c[0].bias, c[1].bias, c[0].bias, c[1].bias};
        uint32_t from = 0U;
        for (uint32_t s = 0U; s < count; s++) {
            const int8_t *const pixel = segments[s] + at;
            dot_two_by_two(pixel, pixel + step, weights + from, second + from, bytes, &sums);
            from += bytes;
        }
        if ((o->fast != 0U) && (outputs == 2U)) {
            store_four(&four, &sums, to);
        } else {
            to[0] = output_byte(o, &c[0], sums.of00);
            to[pitch] = output_byte(o, &c[0], sums.of10);
            if (outputs == 2U) {
                to[1] = output_byte(o, &c[1], sums.of01);
                to[pitch + 1U] = output_byte(o, &c[1], sums.of11);
            }
        }
        to += 2U * pitch;
        at += 2U * step;
    }
    if (x < width) {
        int32_t sums[2] = {c[0].bias, c[1].bias};
        uint32_t from = 0U;
        for (uint32_t s = 0U; s < count; s++) {
            dot_one_by_two(segments[s] + at, weights + from, second + from, bytes, sums);
            from += bytes;
        }
        to[0] = output_byte(o, &c[0], sums[0]);
        if (outputs == 2U) {
            to[1] = output_byte(o, &c[1], sums[1]);
        }
    }
}

void shoal_conv(const struct shoal_conv *k, const int8_t *input, int8_t *output, void *scratch)
{
    const uint32_t segment_count = (uint32_t)k->kernel_height * k->row_segments;
    const int8_t **segments = (const int8_t **)scratch;
    int8_t *const ring = (int8_t *)(void *)(segments + segment_count);
    int8_t *const room = ring + (uint32_t)k->ring_rows * k->ring_row * 2U;
    const uint32_t pair_bytes = segment_count * k->quads * 8U;
    const struct output o = output_of(k->out_zero, k->low, k->high, k->fast);
    uint32_t next = 0U;
    for (uint32_t y = 0U; y < k->out_height; y++) {
        const uint32_t first = y * k->stride_y;
        next = next < first ? first : next;
        for (; next < first + (k->kernel_height - 1U) * k->dilation_y + 1U; next++) {
            byte_row(k, input, next, ring + next % k->ring_rows * k->ring_row);
        }
        for (uint32_t row = 0U; row < k->kernel_height; row++) {
            const uint32_t place = (first + row * k->dilation_y) % k->ring_rows;
            for (uint32_t s = 0U; s < k->row_segments; s++) {
                segments[row * k->row_segments + s] =
                    ring + place * k->ring_row + s * k->segment_step;
            }
        }
        const int8_t *weights = k->weights;
        const struct shoal_channel *c = k->channels;
        for (uint32_t g = 0U; g < k->groups; g++) {
            for (uint32_t pair = 0U; pair < k->group_pairs; pair++) {
                const uint32_t left = k->group_outputs - 2U * pair;
                int8_t *const to = output + g * k->group_outputs + 2U * pair;
                const uint32_t at = g * k->group_pixel;
                const int8_t *pair_weights = weights;
                if (k->int4 != 0U) {
                    unpack_int4(weights, room, pair_bytes);
                    pair_weights = room;
                }
                if ((o.fast != 0U) && (left >= 2U)) {
                    const struct output fast = {o.zero, o.low, o.high, 1U, 0U};
                    conv_row(k, segments, &fast, pair_weights, c, at, to, 2U);
                } else {
                    conv_row(k, segments, &o, pair_weights, c, at, to, left < 2U ? left : 2U);
                }
                weights += k->int4 != 0U ? pair_bytes / 2U : pair_bytes;
                c += 2;
            }
        }
        output += (uint32_t)k->out_width * k->out_channels;
    }
}

#else

#if defined(SHOAL_DSP)

#define SHOAL_WOVEN(weights, all, low)                                                             \
    "ldrd r6, r8, [%[" weights "]], #8\n\t"                                                        \
    "smlad %[" all "], r6, r4, %[" all "]\n\t"                                                     \
    "sxtb16 r6, r6\n\t"                                                                            \
    "smlad %[" low "], r6, r4, %[" low "]\n\t"                                                     \
    "smlad %[" all "], r8, r5, %[" all "]\n\t"                                                     \
    "sxtb16 r8, r8\n\t"                                                                            \
    "smlad %[" low "], r8, r5, %[" low "]\n\t"

#define SHOAL_WOVEN_QUAD                                                                           \
    "ldrd r4, r5, [%[x]], #8\n\t"                                                                  \
    SHOAL_WOVEN("first", "all0", "low0")                                                           \
    SHOAL_WOVEN("second", "all1", "low1")

#endif

/* One pixel times four channels: the first channel of a pair is the lower byte of a weight, what is
 * left of the whole the second. */
SHOAL_APART static void woven_dot(const int8_t *first, const int8_t *second, const int16_t *x,
                                  uint32_t quads, int32_t *sums)
{
    int32_t all0 = 0;
    int32_t low0 = 0;
    int32_t all1 = 0;
    int32_t low1 = 0;
#if defined(SHOAL_DSP)
    __asm__ volatile("tst %[quads], #3\n\t"
                     "beq 2f\n\t"
                     "1:\n\t"
                     SHOAL_WOVEN_QUAD
                     "subs %[quads], %[quads], #1\n\t"
                     "beq 3f\n\t"
                     "tst %[quads], #3\n\t"
                     "bne 1b\n\t"
                     "2:\n\t"
                     SHOAL_WOVEN_QUAD
                     SHOAL_WOVEN_QUAD
                     SHOAL_WOVEN_QUAD
                     SHOAL_WOVEN_QUAD
                     "subs %[quads], %[quads], #4\n\t"
                     "bne 2b\n\t"
                     "3:\n\t"
                     : [first] "+r"(first), [second] "+r"(second), [x] "+r"(x),
                       [quads] "+r"(quads), [all0] "+r"(all0), [low0] "+r"(low0),
                       [all1] "+r"(all1), [low1] "+r"(low1)
                     :
                     : "r4", "r5", "r6", "r8", "cc", "memory");
#else
    const int16_t *const end = x + 4U * quads;
    for (; x != end; x++) {
        all0 += *(const int16_t *)(const void *)first * *x;
        low0 += *first * *x;
        all1 += *(const int16_t *)(const void *)second * *x;
        low1 += *second * *x;
        first += 2;
        second += 2;
    }
#endif
    sums[0] += low0;
    sums[1] += (all0 - low0) >> 8;
    sums[2] += low1;
    sums[3] += (all1 - low1) >> 8;
}

/* One pixel of a group, four channels at a time; of the last two there may be no others. */
static void woven_pixel(const struct shoal_conv *k, const struct dots *d, const struct output *o,
                        const int8_t *weights, const struct shoal_channel *c, uint32_t group_byte,
                        int8_t *to)
{
    const uint32_t pair_bytes = d->segment_count * k->quads * 8U;
    for (uint32_t channel = 0U; channel < k->group_outputs; channel += 4U) {
        const uint32_t left = k->group_outputs - channel;
        const int8_t *first = weights;
        const int8_t *second = left > 2U ? weights + pair_bytes : weights;
        int32_t sums[4] = {0, 0, 0, 0};
        for (uint32_t s = 0U; s < d->segment_count; s++) {
            const int16_t *x = d->segments[s] + group_byte / 2U;
            for (uint32_t rest = k->quads; rest != 0U;) {
                const uint32_t quads = rest < k->woven ? rest : k->woven;
                woven_dot(first, second, x, quads, sums);
                first += 8U * quads;
                second += 8U * quads;
                x += 4U * quads;
                rest -= quads;
            }
        }
        for (uint32_t i = 0U; (i < 4U) && (i < left); i++) {
            to[channel + i] = output_byte(o, &c[channel + i], c[channel + i].bias + sums[i]);
        }
        weights += 2U * pair_bytes;
    }
}

/* One row of one pair of output channels. outputs: 2, or 1 where the second is padding. */
#if !defined(SHOAL_DSP)
SHOAL_APART
#endif
static void conv_row(const struct shoal_conv *k, const struct dots *d, const struct output *o,
                     const int8_t *weights, const struct shoal_channel *c, uint32_t group_byte,
                     int16_t *slab, int8_t *to, uint32_t outputs)
{
    const uint32_t pitch = k->out_channels;
    int32_t sums[4];
    uint32_t x = 0U;
#if defined(SHOAL_DSP)
    const uint32_t blocks = k->out_width / 2U;
    if ((blocks != 0U) && (o->fast != 0U) && (outputs == 2U)) {
        struct row_job job = {{{c[0].multiplier, c[0].rounding, c[0].doubled, c[0].right},
                               {c[1].multiplier, c[1].rounding, c[1].doubled, c[1].right}},
                              {c[0].bias, c[1].bias},
                              slab,
                              to,
                              blocks,
                              pitch,
                              group_byte,
                              d->bytes,
                              d->step_bytes,
                              (0U - d->bytes / 16U) % 4U * 44U,
                              d->segments,
                              d->segments + d->segment_count};
        widen_weights(weights, slab, d->segment_count * d->bytes / 2U);
        fast_row(&job);
        x = blocks * 2U;
        clamp_pair(o, to, pitch, x);
    }
#else
    (void)slab;
    for (; x + 2U <= k->out_width; x += 2U) {
        sums[0] = c[0].bias;
        sums[1] = c[1].bias;
        sums[2] = c[0].bias;
        sums[3] = c[1].bias;
        dot_two_by_two(weights, d, group_byte + x * d->step_bytes, sums);
        int8_t *const at = to + x * pitch;
        at[0] = output_byte(o, &c[0], sums[0]);
        at[pitch] = output_byte(o, &c[0], sums[2]);
        if (outputs == 2U) {
            at[1] = output_byte(o, &c[1], sums[1]);
            at[pitch + 1U] = output_byte(o, &c[1], sums[3]);
        }
    }
#endif
    for (; x < k->out_width; x++) {
        sums[0] = c[0].bias;
        sums[1] = c[1].bias;
        dot_one_by_two(weights, d, group_byte + x * d->step_bytes, sums);
        int8_t *const at = to + x * pitch;
        at[0] = output_byte(o, &c[0], sums[0]);
        if (outputs == 2U) {
            at[1] = output_byte(o, &c[1], sums[1]);
        }
    }
}

void shoal_conv(const struct shoal_conv *k, const int8_t *input, int8_t *output, void *scratch)
{
    const uint32_t segment_count = (uint32_t)k->kernel_height * k->row_segments;
    const uint32_t pair_bytes = segment_count * k->quads * 8U;
    const int16_t **segments = (const int16_t **)scratch;
    int16_t *const ring_space = (int16_t *)(void *)(segments + segment_count);
    struct ring ring = {ring_space, k->ring_rows, k->ring_row, k->ring_columns, k->pixel,
                        k->pad_top, k->pad_left, k->in_height, k->in_width, k->in_channels,
                        k->groups, k->group_channels, k->group_pixel, k->in_zero, 0U};
    int16_t *const slab = ring_space + (uint32_t)k->ring_rows * k->ring_row;
    int8_t *const room = (int8_t *)(slab + (k->out_width >= 2U ? pair_bytes : 0U));
    const struct dots d = {segments, segment_count, k->quads * 16U,
                           (uint32_t)k->stride_x * k->pixel * 2U};
    const struct output o = output_of(k->out_zero, k->low, k->high, k->fast);
    for (uint32_t y = 0U; y < k->out_height; y++) {
        const uint32_t first = y * k->stride_y;
        ring_fill(&ring, input, first, (k->kernel_height - 1U) * k->dilation_y + 1U);
        for (uint32_t row = 0U; row < k->kernel_height; row++) {
            const int16_t *const start = ring_row(&ring, first + row * k->dilation_y);
            for (uint32_t s = 0U; s < k->row_segments; s++) {
                segments[row * k->row_segments + s] = start + s * k->segment_step;
            }
        }
        const int8_t *weights = k->weights;
        const struct shoal_channel *c = k->channels;
        for (uint32_t g = 0U; g < k->groups; g++) {
            if (k->woven != 0U) {
                woven_pixel(k, &d, &o, weights, c, g * k->group_pixel * 2U,
                            output + g * k->group_outputs);
                weights += k->group_pairs * pair_bytes;
                c += 2U * k->group_pairs;
                continue;
            }
            for (uint32_t pair = 0U; pair < k->group_pairs; pair++) {
                const uint32_t left = k->group_outputs - 2U * pair;
                const int8_t *pair_weights = weights;
                if (k->int4 != 0U) {
                    unpack_int4(weights, room, pair_bytes);
                    pair_weights = room;
                }
                conv_row(k, &d, &o, pair_weights, c, g * k->group_pixel * 2U, slab,
                         output + g * k->group_outputs + 2U * pair, left < 2U ? left : 2U);
                weights += k->int4 != 0U ? pair_bytes / 2U : pair_bytes;
                c += 2;
            }
        }
        output += (uint32_t)k->out_width * k->out_channels;
    }
}

#endif /* SHOAL_MVE */

/* ---- depthwise convolutions, a channel at a time -------------------------------------------- */

#if defined(SHOAL_DSP)

#if !defined(SHOAL_MVE)

/* A row of all channels of a 3 x 3 kernel as the assembly reads it, by offset; what changes from
 * channel to channel it writes. */
struct planes_job {
    uint32_t pairs[6]; /* of three rows: taps 0 and 1, taps 1 and 2 */
    int32_t multiplier, rounding;
    uint32_t right, doubled;
    const int16_t *rows[3];
    int8_t *to;
    const int8_t *weights;
    const struct shoal_channel *channels;
    uint32_t plane_bytes;
    uint32_t pitch;  /* channels */
    uint32_t pixels; /* at least one */
    uint32_t left;   /* channels that are left, at least one */
};

/* Three weights as two pairs. */
#define SHOAL_PAIRS(from, to)                                                                      \
    "ldr r4, [r0, #" from "]\n\t"                                                                  \
    "sxtb16 r5, r4\n\t"                                                                            \
    "sxtb16 r6, r4, ror #8\n\t"                                                                    \
    "pkhbt r8, r5, r6, lsl #16\n\t"                                                                \
    "pkhbt r9, r6, r5\n\t"                                                                         \
    "strd r8, r9, [r12, #" to "]\n\t"

/* To the loop over pixels: r0..r2 rows, r3 output, r10 bias, r11 pitch, r12 job, lr pixels left. */
#define SHOAL_PLANE_START                                                                          \
    "push {r4, r5, r6, r7, r8, r9, r10, r11, lr}\n\t"                                              \
    "mov r12, r0\n\t"                                                                              \
    "1:\n\t"                                                                                       \
    "ldr r0, [r12, #56]\n\t"                                                                       \
    SHOAL_PAIRS("0", "0")                                                                          \
    SHOAL_PAIRS("3", "8")                                                                          \
    SHOAL_PAIRS("6", "16")                                                                         \
    "add r0, r0, #9\n\t"                                                                           \
    "ldr r1, [r12, #60]\n\t"                                                                       \
    "ldmia r1!, {r4, r5, r6, r7}\n\t"                                                              \
    "strd r0, r1, [r12, #56]\n\t"                                                                  \
    "strd r5, r6, [r12, #24]\n\t"                                                                  \
    "ubfx r8, r7, #8, #8\n\t"                                                                      \
    "ubfx r9, r7, #16, #8\n\t"                                                                     \
    "strd r8, r9, [r12, #32]\n\t"                                                                  \
    "mov r10, r4\n\t"                                                                              \
    "ldr r11, [r12, #64]\n\t"                                                                      \
    "add lr, r12, #40\n\t"                                                                         \
    "ldmia lr, {r0, r1, r2, r3}\n\t"                                                               \
    "add r4, r0, r11\n\t"                                                                          \
    "add r5, r1, r11\n\t"                                                                          \
    "add r6, r2, r11\n\t"                                                                          \
    "add r7, r3, #1\n\t"                                                                           \
    "stmia lr, {r4, r5, r6, r7}\n\t"                                                               \
    "ldrd r11, lr, [r12, #68]\n\t"                                                                 \
    "2:\n\t"

/* Sums r4 and r5 to values of bytes: r8 multiplier, r9 rounding, r6 and r7 shifts. */
#define SHOAL_TWO_OUTPUTS                                                                          \
    "lsl r4, r4, r7\n\t"                                                                           \
    "lsl r5, r5, r7\n\t"                                                                           \
    "smmulr r4, r4, r8\n\t"                                                                        \
    "smmulr r5, r5, r8\n\t"                                                                        \
    "add r4, r4, r4, asr #31\n\t"                                                                  \
    "add r5, r5, r5, asr #31\n\t"                                                                  \
    "add r4, r4, r9\n\t"                                                                           \
    "add r5, r5, r9\n\t"                                                                           \
    "asr r4, r4, r6\n\t"                                                                           \
    "asr r5, r5, r6\n\t"                                                                           \
    "ssat r4, #8, r4\n\t"                                                                          \
    "ssat r5, #8, r5\n\t"

/* Sums r4 and r5 to bytes; the second only if there are two pixels left. */
#define SHOAL_PLANE_OUTPUT                                                                         \
    "ldrd r8, r9, [r12, #24]\n\t"                                                                  \
    "ldrd r6, r7, [r12, #32]\n\t"                                                                  \
    SHOAL_TWO_OUTPUTS                                                                              \
    "strb r4, [r3]\n\t"                                                                            \
    "subs lr, lr, #2\n\t"                                                                          \
    "it pl\n\t"                                                                                    \
    "strbpl r5, [r3, r11]\n\t"                                                                     \
    "add r3, r3, r11, lsl #1\n\t"                                                                  \
    "bgt 2b\n\t"                                                                                   \
    "ldr r4, [r12, #76]\n\t"                                                                       \
    "subs r4, r4, #1\n\t"                                                                          \
    "str r4, [r12, #76]\n\t"                                                                       \
    "bne 1b\n\t"                                                                                   \
    "pop {r4, r5, r6, r7, r8, r9, r10, r11, pc}\n\t"

/* Three taps of two pixels beside each other; sum4 and sum5: what the sums so far are in. */
#define SHOAL_NEAR_TAPS(row, weights, sum4, sum5)                                                  \
    "ldrd r6, r7, [" row "], #4\n\t"                                                               \
    "ldrd r8, r9, [r12, #" weights "]\n\t"                                                         \
    "smlad r4, r6, r8, " sum4 "\n\t"                                                               \
    "smlatb r5, r6, r8, " sum5 "\n\t"                                                              \
    "smlabt r4, r7, r9, r4\n\t"                                                                    \
    "smlad r5, r7, r9, r5\n\t"

/* The same of two pixels with a stride of 2. */
#define SHOAL_FAR_TAPS(row, weights, sum4, sum5)                                                   \
    "ldrd r6, r7, [" row "], #8\n\t"                                                               \
    "ldrd r8, r9, [r12, #" weights "]\n\t"                                                         \
    "smlad r4, r6, r8, " sum4 "\n\t"                                                               \
    "ldr r6, [" row "]\n\t"                                                                        \
    "smlad r5, r7, r8, " sum5 "\n\t"                                                               \
    "smlabt r4, r7, r9, r4\n\t"                                                                    \
    "smlabt r5, r6, r9, r5\n\t"

/* For fast layers; clamped to int8 only. */
__attribute__((naked, noinline)) static void
nine_near_taps(struct planes_job *job __attribute__((unused)))
{
    __asm__ volatile(SHOAL_PLANE_START
                     SHOAL_NEAR_TAPS("r0", "0", "r10", "r10")
                     SHOAL_NEAR_TAPS("r1", "8", "r4", "r5")
                     SHOAL_NEAR_TAPS("r2", "16", "r4", "r5")
                     SHOAL_PLANE_OUTPUT);
}

__attribute__((naked, noinline)) static void
nine_far_taps(struct planes_job *job __attribute__((unused)))
{
    __asm__ volatile(SHOAL_PLANE_START
                     SHOAL_FAR_TAPS("r0", "0", "r10", "r10")
                     SHOAL_FAR_TAPS("r1", "8", "r4", "r5")
                     SHOAL_FAR_TAPS("r2", "16", "r4", "r5")
                     SHOAL_PLANE_OUTPUT);
}

static void nine_rows(const struct shoal_depthwise *k, const int16_t *const *rows, int8_t *to)
{
    struct planes_job job = {{0U, 0U, 0U, 0U, 0U, 0U}, 0, 0, 0U, 0U, {rows[0], rows[1], rows[2]},
                             to, k->weights, k->channels, k->plane * 2U, k->channel_count,
                             k->out_width, k->channel_count};
    if (k->stride_x == 1U) {
        nine_near_taps(&job);
    } else {
        nine_far_taps(&job);
    }
}

/* A row of a channel of any kernel whose taps lie in `words` words of the ring, as the assembly
 * reads it, by offset; it counts begin, to and pixels. */
struct taps_job {
    const int16_t *const *rows;
    uint32_t row_count;
    uint32_t begin;  /* bytes, of the pixel in a row */
    uint32_t skip;   /* bytes of code of the words that are not needed */
    const uint32_t *pairs; /* a word of the ring: the weights at the first pixel, at the second */
    uint32_t second; /* bytes from the word of the first pixel to the second's */
    uint32_t step;   /* bytes from two pixels to the next two */
    int8_t *to;
    uint32_t pitch;  /* channels */
    uint32_t pixels; /* at least one */
    const struct shoal_channel *channel;
};

#define SHOAL_MOST_WORDS 4U

/* Two pixels at a time: r0 pairs, r1 ring, r2 second, r3 where a row's code begins, r4 and r5 sums,
 * r10 and r11 rows, lr begin. */
#define SHOAL_TAPS(word)                                                                           \
    "push {r4, r5, r6, r7, r8, r9, r10, r11, lr}\n\t"                                              \
    "mov r12, r0\n\t"                                                                              \
    "ldr r2, [r12, #20]\n\t"                                                                       \
    "ldr r4, [r12, #12]\n\t"                                                                       \
    "adr.w r3, 3f\n\t"                                                                             \
    "add r3, r3, r4\n\t"                                                                           \
    "orr r3, r3, #1\n\t"                                                                           \
    "1:\n\t"                                                                                       \
    "ldr r0, [r12, #16]\n\t"                                                                       \
    "ldr r8, [r12, #40]\n\t"                                                                       \
    "ldrd r10, r11, [r12]\n\t"                                                                     \
    "ldr lr, [r12, #8]\n\t"                                                                        \
    "ldr r4, [r8]\n\t"                                                                             \
    "mov r5, r4\n\t"                                                                               \
    "2:\n\t"                                                                                       \
    "ldr r1, [r10], #4\n\t"                                                                        \
    "add r1, r1, lr\n\t"                                                                           \
    "bx r3\n\t"                                                                                    \
    ".balign 4\n\t"                                                                                \
    "3:\n\t"                                                                                       \
    word word word word                                                                            \
    "subs r11, r11, #1\n\t"                                                                        \
    "bne 2b\n\t"                                                                                   \
    "ldr r10, [r12, #40]\n\t"                                                                      \
    "ldrd r8, r9, [r10, #4]\n\t"                                                                   \
    "ldrb r6, [r10, #13]\n\t"                                                                      \
    "ldrb r7, [r10, #14]\n\t"                                                                      \
    SHOAL_TWO_OUTPUTS                                                                              \
    "ldr r6, [r12, #28]\n\t"                                                                       \
    "ldrd r10, r11, [r12, #32]\n\t"                                                                \
    "strb r4, [r6]\n\t"                                                                            \
    "subs r11, r11, #2\n\t"                                                                        \
    "it pl\n\t"                                                                                    \
    "strbpl r5, [r6, r10]\n\t"                                                                     \
    "add r6, r6, r10, lsl #1\n\t"                                                                  \
    "str r6, [r12, #28]\n\t"                                                                       \
    "str r11, [r12, #36]\n\t"                                                                      \
    "ldr r7, [r12, #24]\n\t"                                                                       \
    "add lr, lr, r7\n\t"                                                                           \
    "str lr, [r12, #8]\n\t"                                                                        \
    "bgt 1b\n\t"                                                                                   \
    "pop {r4, r5, r6, r7, r8, r9, r10, r11, pc}\n\t"

/* 16 bytes of code: both pixels are in the same words. */
#define SHOAL_NEAR_WORD                                                                            \
    "ldr.w r6, [r1], #4\n\t"                                                                       \
    "ldrd r8, r9, [r0], #8\n\t"                                                                    \
    "smlad r4, r6, r8, r4\n\t"                                                                     \
    "smlad r5, r6, r9, r5\n\t"

/* 20 bytes of code. */
#define SHOAL_FAR_WORD                                                                             \
    "ldr.w r7, [r1, r2]\n\t"                                                                       \
    "ldr.w r6, [r1], #4\n\t"                                                                       \
    "ldrd r8, r9, [r0], #8\n\t"                                                                    \
    "smlad r4, r6, r8, r4\n\t"                                                                     \
    "smlad r5, r7, r9, r5\n\t"

__attribute__((naked, noinline)) static void
near_taps(struct taps_job *job __attribute__((unused)))
{
    __asm__ volatile(SHOAL_TAPS(SHOAL_NEAR_WORD));
}

__attribute__((naked, noinline)) static void
far_taps(struct taps_job *job __attribute__((unused)))
{
    __asm__ volatile(SHOAL_TAPS(SHOAL_FAR_WORD));
}

/* Weights as words of the ring meet them: two a word, at a pixel that begins at an even place, and
 * at the next one, which begins at an odd place where the stride is odd. */
static void pair_taps(const struct shoal_depthwise *k, const int8_t *w, uint32_t *pairs)
{
    int16_t line[2U * SHOAL_MOST_WORDS + 2U] = {0};
    const uint32_t odd = 1U - k->stride_x % 2U;
    for (uint32_t row = 0U; row < k->kernel_height; row++) {
        int16_t *at = line + 1;
        for (uint32_t tap = 0U; tap < k->kernel_width; tap++) {
            *at = *w;
            at += k->dilation_x;
            w++;
        }
        for (uint32_t word = 0U; word < 2U * k->words; word += 2U) {
            pairs[0] = load4(line + 1U + word);
            pairs[1] = load4(line + odd + word);
            pairs += 2;
        }
    }
}

/* For fast layers; clamped to int8 only. */
static void taps_rows(const struct shoal_depthwise *k, const int16_t *const *rows, uint32_t *pairs,
                      int8_t *to)
{
    const int8_t *w = k->weights;
    const uint32_t code = k->stride_x == 1U ? 16U : 20U;
    for (uint32_t c = 0U; c < k->channel_count; c++) {
        struct taps_job job = {rows, k->kernel_height, c * k->plane * 2U,
                               (SHOAL_MOST_WORDS - k->words) * code, pairs,
                               k->stride_x / 2U * 4U, k->stride_x * 4U, to + c, k->channel_count,
                               k->out_width, k->channels + c};
        pair_taps(k, w, pairs);
        if (k->stride_x == 1U) {
            near_taps(&job);
        } else {
            far_taps(&job);
        }
        w += (uint32_t)k->kernel_height * k->kernel_width;
    }
}

#endif

/* Pairs of pixels of four channels, to words of four planes. channels: bytes from a pixel to the
 * next; offset: less the zero point, twice; plane: bytes. r0..r5 the arguments, r6 three planes. */
__attribute__((naked, noinline)) static void
four_planes(const int8_t *from __attribute__((unused)), uint32_t channels __attribute__((unused)),
            uint32_t pairs __attribute__((unused)), uint32_t offset __attribute__((unused)),
            int16_t *to __attribute__((unused)), uint32_t plane __attribute__((unused)))
{
    __asm__ volatile("push {r4, r5, r6, r7, r8, r9, r10, lr}\n\t"
                     "ldrd r4, r5, [sp, #32]\n\t"
                     "add r6, r5, r5, lsl #1\n\t"
                     "1:\n\t"
                     "ldr r7, [r0]\n\t"
                     "ldr r8, [r0, r1]\n\t"
                     "sxtab16 r9, r3, r7\n\t"
                     "sxtab16 r7, r3, r7, ror #8\n\t"
                     "sxtab16 r10, r3, r8\n\t"
                     "sxtab16 r8, r3, r8, ror #8\n\t"
                     "pkhbt r12, r7, r8, lsl #16\n\t"
                     "str r12, [r4, r5]\n\t"
                     "pkhtb r12, r10, r9, asr #16\n\t"
                     "str r12, [r4, r5, lsl #1]\n\t"
                     "pkhtb r12, r8, r7, asr #16\n\t"
                     "str r12, [r4, r6]\n\t"
                     "pkhbt r12, r9, r10, lsl #16\n\t"
                     "str r12, [r4], #4\n\t"
                     "add r0, r0, r1, lsl #1\n\t"
                     "subs r2, r2, #1\n\t"
                     "bne 1b\n\t"
                     "pop {r4, r5, r6, r7, r8, r9, r10, pc}\n\t");
}

#endif

/* Columns begin .. end - 1 of `count` channels, each to its plane. */
static void planes(const struct shoal_depthwise *k, const int8_t *from, uint32_t begin,
                   uint32_t end, uint32_t count, int16_t *to)
{
    const uint32_t channels = k->channel_count;
    const uint32_t plane = k->plane;
    const int32_t zero = k->in_zero;
    from += begin * channels;
    for (uint32_t x = begin; x < end; x++) {
        int16_t *at = to + x;
        for (uint32_t c = 0U; c < count; c++) {
            *at = (int16_t)(from[c] - zero);
            at += plane;
        }
        from += channels;
    }
}

/* A row of the input, each channel to its plane. What lies beyond the input stays as it is. */
static void plane_row(const struct shoal_depthwise *k, const int8_t *input, uint32_t padded_row,
                      int16_t *to)
{
    const uint32_t channels = k->channel_count;
    const uint32_t plane = k->plane;
    if ((padded_row < k->pad_top) || (padded_row - k->pad_top >= k->in_height)) {
        memset(to, 0, channels * plane * sizeof *to);
        return;
    }
    const int8_t *from = input + (padded_row - k->pad_top) * k->in_width * channels;
    const uint32_t columns = k->ring_columns;
    const uint32_t room = columns > k->pad_left ? columns - k->pad_left : 0U;
    const uint32_t width = k->in_width < room ? k->in_width : room;
    to += k->pad_left;
#if defined(SHOAL_DSP)
    const uint32_t offset = ((uint32_t)-k->in_zero & 0xFFFFU) * 0x10001U;
    const uint32_t odd = (width != 0U) ? k->pad_left % 2U : 0U; /* so that words are aligned */
    const uint32_t even = width - (width - odd) % 2U;
    for (uint32_t c = 0U; c + 4U <= channels; c += 4U) {
        planes(k, from, 0U, odd, 4U, to);
        if (even != odd) {
            four_planes(from + odd * channels, channels, (even - odd) / 2U, offset, to + odd,
                        plane * 2U);
        }
        planes(k, from, even, width, 4U, to);
        from += 4;
        to += 4U * plane;
    }
    planes(k, from, 0U, width, channels % 4U, to);
#else
    planes(k, from, 0U, width, channels, to);
#endif
}

#if defined(SHOAL_MVE)

/* A row of a channel of a 3 x 3 kernel as the assembly reads it, by offset; a pixel's sum begins
 * with the bias, both it and the weights doubled as often as the channel says. */
struct vector_job {
    const int16_t *rows[3];
    int32_t weights[9];
    int8_t *to;
    uint32_t pixels;
    int32_t bias;
    uint32_t pitch; /* channels */
    int32_t multiplier, rounding, right, low, high;
};

/* r0..r2 rows, r3..r11 weights, r12 output; q0 sums, q2 multiplier, q3 rounding, q4 shift, q5 where
 * the bytes go, q6 and q7 low and high. On the stack: bias four times, a weight, the next step. */
#define SHOAL_NINE_VECTORS(row0, row1, row2)                                                       \
    "push {r4, r5, r6, r7, r8, r9, r10, r11, lr}\n\t"                                              \
    "vpush {d8, d9, d10, d11, d12, d13, d14, d15}\n\t"                                             \
    "sub sp, sp, #24\n\t"                                                                          \
    "add r1, r0, #56\n\t"                                                                          \
    "ldmia r1, {r1, r2, r3, r4, r5, r6, r7}\n\t"                                                   \
    "vdup.32 q0, r1\n\t"                                                                           \
    "vstrw.32 q0, [sp]\n\t"                                                                        \
    "vdup.32 q2, r3\n\t"                                                                           \
    "vdup.32 q3, r4\n\t"                                                                           \
    "vdup.32 q4, r5\n\t"                                                                           \
    "vdup.32 q6, r6\n\t"                                                                           \
    "vdup.32 q7, r7\n\t"                                                                           \
    "movs r4, #0\n\t"                                                                              \
    "vidup.u32 q5, r4, #1\n\t"                                                                     \
    "vmul.i32 q5, q5, r2\n\t"                                                                      \
    "lsl r2, r2, #2\n\t"                                                                           \
    "ldr r1, [r0, #44]\n\t"                                                                        \
    "strd r1, r2, [sp, #16]\n\t"                                                                   \
    "ldr lr, [r0, #52]\n\t"                                                                        \
    "ldmia r0, {r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12}\n\t"                        \
    "dlstp.32 lr, lr\n\t"                                                                          \
    "1:\n\t"                                                                                       \
    "vldrw.32 q0, [sp]\n\t"                                                                        \
    "ldr r11, [sp, #16]\n\t"                                                                       \
    row0 row1 row2                                                                                 \
    "ldr r11, [sp, #20]\n\t"                                                                       \
    "vqrdmulh.s32 q0, q0, q2\n\t"                                                                  \
    "vshr.s32 q1, q0, #31\n\t"                                                                     \
    "vadd.i32 q0, q0, q1\n\t"                                                                      \
    "vadd.i32 q0, q0, q3\n\t"                                                                      \
    "vshl.s32 q0, q0, q4\n\t"                                                                      \
    "vmax.s32 q0, q0, q6\n\t"                                                                      \
    "vmin.s32 q0, q0, q7\n\t"                                                                      \
    "vstrb.32 q0, [r12, q5]\n\t"                                                                   \
    "add r12, r12, r11\n\t"                                                                        \
    "letp lr, 1b\n\t"                                                                              \
    "add sp, sp, #24\n\t"                                                                          \
    "vpop {d8, d9, d10, d11, d12, d13, d14, d15}\n\t"                                              \
    "pop {r4, r5, r6, r7, r8, r9, r10, r11, pc}\n\t"

/* Three taps of four pixels beside each other. */
#define SHOAL_NEAR_VECTORS(row, w0, w1, w2)                                                        \
    "vldrh.s32 q1, [" row ", #2]\n\t"                                                              \
    "vmla.s32 q0, q1, " w1 "\n\t"                                                                  \
    "vldrh.s32 q1, [" row ", #4]\n\t"                                                              \
    "vmla.s32 q0, q1, " w2 "\n\t"                                                                  \
    "vldrh.s32 q1, [" row "], #8\n\t"                                                              \
    "vmla.s32 q0, q1, " w0 "\n\t"

/* The same with a stride of 2: the lower halves of words, the higher ones, those of the next. */
#define SHOAL_FAR_VECTORS(row, w0, w1, w2)                                                         \
    "vldrw.32 q1, [" row ", #4]\n\t"                                                               \
    "vmovlb.s16 q1, q1\n\t"                                                                        \
    "vmla.s32 q0, q1, " w2 "\n\t"                                                                  \
    "vldrw.32 q1, [" row "]\n\t"                                                                   \
    "vmovlt.s16 q1, q1\n\t"                                                                        \
    "vmla.s32 q0, q1, " w1 "\n\t"                                                                  \
    "vldrw.32 q1, [" row "], #16\n\t"                                                              \
    "vmovlb.s16 q1, q1\n\t"                                                                        \
    "vmla.s32 q0, q1, " w0 "\n\t"

__attribute__((naked, noinline)) static void
near_vectors(const struct vector_job *job __attribute__((unused)))
{
    __asm__ volatile(SHOAL_NINE_VECTORS(SHOAL_NEAR_VECTORS("r0", "r3", "r4", "r5"),
                                        SHOAL_NEAR_VECTORS("r1", "r6", "r7", "r8"),
                                        SHOAL_NEAR_VECTORS("r2", "r9", "r10", "r11")));
}

__attribute__((naked, noinline)) static void
far_vectors(const struct vector_job *job __attribute__((unused)))
{
    __asm__ volatile(SHOAL_NINE_VECTORS(SHOAL_FAR_VECTORS("r0", "r3", "r4", "r5"),
                                        SHOAL_FAR_VECTORS("r1", "r6", "r7", "r8"),
                                        SHOAL_FAR_VECTORS("r2", "r9", "r10", "r11")));
}

static void nine_rows(const struct shoal_depthwise *k, const int16_t *const *rows,
                      const struct output *o, int8_t *to)
{
    const uint32_t channels = k->channel_count;
    const uint32_t plane = k->plane;
    const uint32_t step = k->stride_x;
    const int8_t *w = k->weights;
    const struct shoal_channel *c = k->channels;
    struct vector_job job = {{rows[0], rows[1], rows[2]}, {0, 0, 0, 0, 0, 0, 0, 0, 0}, to,
                             k->out_width, 0, channels, 0, 0, 0, o->low, o->high};
    for (uint32_t i = 0U; i < channels; i++) {
        const int32_t factor = (int32_t)(1U << c->left);
        vstrwq_s32(job.weights, vmulq_n_s32(vldrbq_s32(w), factor));
        vstrwq_s32(job.weights + 4, vmulq_n_s32(vldrbq_s32(w + 4), factor));
        job.weights[8] = w[8] * factor;
        job.bias = c->bias * factor;
        job.multiplier = c->multiplier;
        job.rounding = c->rounding;
        job.right = -(int32_t)c->right;
        if (step == 1U) {
            near_vectors(&job);
        } else {
            far_vectors(&job);
        }
        for (uint32_t row = 0U; row < 3U; row++) {
            job.rows[row] += plane;
        }
        job.to++;
        w += 9;
        c++;
    }
}

/* A row of the output of one channel of a fast layer, whose pixels begin at `begin` of each row of
 * the ring: four pixels at a time. */
static void vector_row(const struct shoal_depthwise *k, const int16_t *const *rows,
                       const struct output *o, const int8_t *weights,
                       const struct shoal_channel *c, uint32_t begin, int8_t *to)
{
    const uint32_t pitch = k->channel_count;
    const uint32_t width = k->out_width;
    const uint32_t taps = k->kernel_width;
    const uint32_t height = k->kernel_height;
    const uint32_t dilation = k->dilation_x;
    const uint32_t step = k->stride_x;
    const uint32x4_t apart = vmulq_n_u32(vidupq_n_u32(0U, 1), step);
    const uint32x4_t places = vmulq_n_u32(vidupq_n_u32(0U, 1), pitch);
    const int32x4_t left = vdupq_n_s32(c->left);
    const int32x4_t right = vdupq_n_s32(-(int32_t)c->right);
    for (uint32_t x = 0U; x < width; x += 4U) {
        const int8_t *w = weights;
        int32x4_t sums = vdupq_n_s32(c->bias);
        for (uint32_t row = 0U; row < height; row++) {
            const int16_t *value = rows[row] + begin + x * step;
            for (uint32_t tap = 0U; tap < taps; tap++) {
                sums = vmlaq_n_s32(sums, vldrhq_gather_shifted_offset_s32(value, apart), w[tap]);
                value += dilation;
            }
            w += taps;
        }
        const int32x4_t t = vqrdmulhq_n_s32(vshlq_s32(sums, left), c->multiplier);
        const int32x4_t rounded = vaddq_n_s32(vaddq_s32(t, vshrq_n_s32(t, 31)), c->rounding);
        const int32x4_t value = vminq_s32(vmaxq_s32(vshlq_s32(rounded, right),
                                                    vdupq_n_s32(o->low)), vdupq_n_s32(o->high));
        vstrbq_scatter_offset_p_s32(to, places, value, vctp32q(width - x));
        to += 4U * pitch;
    }
}

static void vector_rows(const struct shoal_depthwise *k, const int16_t *const *rows,
                        const struct output *o, int8_t *to)
{
    const uint32_t taps = (uint32_t)k->kernel_height * k->kernel_width;
    for (uint32_t i = 0U; i < k->channel_count; i++) {
        const struct shoal_channel c = k->channels[i];
        vector_row(k, rows, o, k->weights + i * taps, &c, i * k->plane, to + i);
    }
}

#endif

/* Three taps beside each other of two pixels, `step` apart. Inline, so that what both pixels read is
 * known to be the same. */
static inline void two_by_three(const int16_t *x, uint32_t step, const int8_t *w, int32_t *sums)
{
    const int32_t first = w[0];
    const int32_t second = w[1];
    const int32_t third = w[2];
    const int32_t shared = x[step];
    sums[0] += first * x[0];
    sums[0] += second * (step == 1U ? shared : x[1]);
    sums[0] += third * (step == 2U ? shared : x[2]);
    sums[1] += first * shared;
    sums[1] += second * x[step + 1U];
    sums[1] += third * x[step + 2U];
}

/* Taps of a row of any kernel, of two pixels. */
static inline void two_by_taps(const int16_t *x, uint32_t step, const int8_t *w, uint32_t taps,
                               uint32_t dilation, int32_t *sums)
{
    for (uint32_t tap = 0U; tap < taps; tap++) {
        sums[0] += w[tap] * x[0];
        sums[1] += w[tap] * x[step];
        x += dilation;
    }
}

/* A row of the output of one channel, whose pixels begin at `begin` of each row of the ring. */
static void depthwise_row(const struct shoal_depthwise *k, const int16_t *const *rows,
                          const struct output *o, const int8_t *weights,
                          const struct shoal_channel *channel, uint32_t begin, int8_t *to)
{
    const struct shoal_channel c = *channel; /* so that stores of bytes do not alter them */
    const struct output out = *o;
    const uint32_t pitch = k->channel_count;
    const uint32_t step = k->stride_x;
    const uint32_t nine = k->nine;
    const uint32_t dilation = k->dilation_x;
    const uint32_t height = k->kernel_height;
    const uint32_t taps = k->kernel_width;
    const uint32_t width = k->out_width;
    for (uint32_t x = 0U; x < width; x += 2U) {
        const int8_t *w = weights;
        int32_t sums[2] = {c.bias, c.bias};
        for (uint32_t row = 0U; row < height; row++) {
            const int16_t *const values = rows[row] + begin + x * step;
            if (nine == 0U) {
                two_by_taps(values, step, w, taps, dilation, sums);
            } else if (step == 1U) {
                two_by_three(values, 1U, w, sums);
            } else {
                two_by_three(values, 2U, w, sums);
            }
            w += taps;
        }
        *to = output_byte(&out, &c, sums[0]);
        if (x + 1U < width) {
            to[pitch] = output_byte(&out, &c, sums[1]);
        }
        to += 2U * pitch;
    }
}

void shoal_depthwise(const struct shoal_depthwise *k, const int8_t *input, int8_t *output,
                     void *scratch)
{
    const int16_t **rows = (const int16_t **)scratch;
    uint32_t *const pairs = (uint32_t *)(void *)(rows + k->kernel_height);
    int16_t *const ring = (int16_t *)(void *)(pairs + 2U * k->kernel_height * k->words);
    const uint32_t channels = k->channel_count;
    const uint32_t ring_row = channels * k->plane;
    const uint32_t row_bytes = k->out_width * channels;
    const struct output o = output_of(k->out_zero, k->low, k->high, k->fast);
    const uint32_t taps = (uint32_t)k->kernel_height * k->kernel_width;
    uint32_t next = 0U;
    memset(ring, 0, k->ring_rows * ring_row * sizeof *ring);
    for (uint32_t y = 0U; y < k->out_height; y++) {
        const uint32_t first = y * k->stride_y;
        next = next < first ? first : next;
        for (; next < first + (k->kernel_height - 1U) * k->dilation_y + 1U; next++) {
            plane_row(k, input, next, ring + next % k->ring_rows * ring_row);
        }
        for (uint32_t row = 0U; row < k->kernel_height; row++) {
            rows[row] = ring + (first + row * k->dilation_y) % k->ring_rows * ring_row;
        }
#if defined(SHOAL_MVE)
        if (o.fast != 0U) {
            if (k->nine != 0U) {
                nine_rows(k, rows, &o, output);
            } else {
                vector_rows(k, rows, &o, output);
            }
            output += row_bytes;
            continue;
        }
#elif defined(SHOAL_DSP)
        if ((o.fast != 0U) && ((k->nine != 0U) || (k->words != 0U))) {
            if (k->nine != 0U) {
                nine_rows(k, rows, output);
            } else {
                taps_rows(k, rows, pairs, output);
            }
            if (o.full == 0U) {
                for (uint32_t i = 0U; i < row_bytes; i++) {
                    output[i] = (int8_t)clamped(output[i], o.low, o.high);
                }
            }
            output += row_bytes;
            continue;
        }
#endif
        for (uint32_t c = 0U; c < channels; c++) {
            depthwise_row(k, rows, &o, k->weights + c * taps, k->channels + c, c * k->plane,
                          output + c);
        }
        output += row_bytes;
    }
}

/* ---- element by element --------------------------------------------------------------------- */

static inline int32_t add_term(int32_t value, int32_t multiplier, uint32_t right)
{
    return shift_right(high_product(shift_left(value, 20U), multiplier), right);
}

static inline int8_t add_one(const struct shoal_add *k, int32_t first, int32_t second)
{
    const int32_t sum = add_term(first - k->first_zero, k->first_multiplier, k->first_right) +
                        add_term(second - k->second_zero, k->second_multiplier, k->second_right);
    const int32_t value = shift_right(high_product(sum, k->out_multiplier), k->out_right);
    return (int8_t)clamped(value + k->out_zero, k->low, k->high);
}

/* The second input's term and the sum, where export found that 32 bits hold everything. */
static inline int8_t add_fast(const struct shoal_add *k, int32_t first, int32_t second)
{
    const int32_t a = shift_left(first - k->first_zero, 19U);
    const int32_t b = high_product_doubled(shift_left(second - k->second_zero, 21U),
                                           k->second_multiplier);
    const int32_t sum = a + ((less_if_negative(b) + k->second_half) >> k->second_right);
    const int32_t t = high_product_doubled(shift_left(sum, 1U), k->out_multiplier);
    const int32_t value = (less_if_negative(t) + k->out_rounding) >> k->out_right;
    return (int8_t)clamped(value, k->low, k->high);
}

static inline int8_t mul_one(const struct shoal_mul *k, int32_t first, int32_t second)
{
    const int32_t product = (first - k->first_zero) * (second - k->second_zero);
    const int32_t value =
        shift_right(high_product(shift_left(product, k->left), k->multiplier), k->right);
    return (int8_t)clamped(value + k->out_zero, k->low, k->high);
}

void shoal_add(const struct shoal_add *k, const struct shoal_broadcast *shape,
               const int8_t *first, const int8_t *second, int8_t *output)
{
    if (k->fast != 0U) {
        const struct shoal_add held = *k; /* so that the loop need not load it again */
        for (uint32_t i = 0U; i < shape->size[3]; i++) {
            output[i] = add_fast(&held, first[i], second[i]);
        }
        return;
    }
    for (uint32_t n = 0U; n < shape->size[0]; n++) {
        for (uint32_t y = 0U; y < shape->size[1]; y++) {
            for (uint32_t x = 0U; x < shape->size[2]; x++) {
                const int8_t *a = first + n * shape->first[0] + y * shape->first[1] +
                                  x * shape->first[2];
                const int8_t *b = second + n * shape->second[0] + y * shape->second[1] +
                                  x * shape->second[2];
                for (uint32_t c = 0U; c < shape->size[3]; c++) {
                    *output = add_one(k, *a, *b);
                    output++;
                    a += shape->first[3];
                    b += shape->second[3];
                }
            }
        }
    }
}

void shoal_mul(const struct shoal_mul *k, const struct shoal_broadcast *shape,
               const int8_t *first, const int8_t *second, int8_t *output)
{
    for (uint32_t n = 0U; n < shape->size[0]; n++) {
        for (uint32_t y = 0U; y < shape->size[1]; y++) {
            for (uint32_t x = 0U; x < shape->size[2]; x++) {
                const int8_t *a = first + n * shape->first[0] + y * shape->first[1] +
                                  x * shape->first[2];
                const int8_t *b = second + n * shape->second[0] + y * shape->second[1] +
                                  x * shape->second[2];
                for (uint32_t c = 0U; c < shape->size[3]; c++) {
                    *output = mul_one(k, *a, *b);
                    output++;
                    a += shape->first[3];
                    b += shape->second[3];
                }
            }
        }
    }
}

void shoal_look_up(const int8_t *table, const int8_t *input, int8_t *output, uint32_t count)
{
    for (uint32_t i = 0U; i < count; i++) {
        output[i] = table[input[i] + 128];
    }
}

/* ---- pooling and moving --------------------------------------------------------------------- */

struct window {
    uint32_t top, bottom, left, right; /* of the input, bottom and right excluded */
};

static struct window window_of(const struct shoal_pool *k, uint32_t y, uint32_t x)
{
    const uint32_t from_y = y * k->stride_y;
    const uint32_t from_x = x * k->stride_x;
    const uint32_t to_y = from_y + k->kernel_height - k->pad_top;
    const uint32_t to_x = from_x + k->kernel_width - k->pad_left;
    struct window w;
    w.top = from_y > k->pad_top ? from_y - k->pad_top : 0U;
    w.left = from_x > k->pad_left ? from_x - k->pad_left : 0U;
    w.bottom = to_y < k->in_height ? to_y : k->in_height;
    w.right = to_x < k->in_width ? to_x : k->in_width;
    return w;
}

void shoal_max_pool(const struct shoal_pool *k, const int8_t *input, int8_t *output)
{
    for (uint32_t y = 0U; y < k->out_height; y++) {
        for (uint32_t x = 0U; x < k->out_width; x++) {
            const struct window w = window_of(k, y, x);
            for (uint32_t c = 0U; c < k->channels; c++) {
                int32_t highest = -128;
                for (uint32_t row = w.top; row < w.bottom; row++) {
                    const int8_t *at = input + (row * k->in_width + w.left) * k->channels + c;
                    for (uint32_t column = w.left; column < w.right; column++) {
                        if (*at > highest) {
                            highest = *at;
                        }
                        at += k->channels;
                    }
                }
                *output = (int8_t)clamped(highest, k->low, k->high);
                output++;
            }
        }
    }
}

void shoal_average_pool(const struct shoal_pool *k, const int8_t *input, int8_t *output)
{
    for (uint32_t y = 0U; y < k->out_height; y++) {
        for (uint32_t x = 0U; x < k->out_width; x++) {
            const struct window w = window_of(k, y, x);
            const int32_t count = (int32_t)((w.bottom - w.top) * (w.right - w.left));
            for (uint32_t c = 0U; c < k->channels; c++) {
                int32_t sum = 0;
                for (uint32_t row = w.top; row < w.bottom; row++) {
                    const int8_t *at = input + (row * k->in_width + w.left) * k->channels + c;
                    for (uint32_t column = w.left; column < w.right; column++) {
                        sum += *at;
                        at += k->channels;
                    }
                }
                sum += sum > 0 ? count / 2 : -(count / 2);
                *output = (int8_t)clamped(sum / count, k->low, k->high);
                output++;
            }
        }
    }
}

void shoal_mean(const struct shoal_mean *k, const int8_t *input, int8_t *output)
{
    for (uint32_t n = 0U; n < k->outer; n++) {
        for (uint32_t i = 0U; i < k->inner; i++) {
            const int8_t *at = input + n * k->count * k->inner + i;
            int32_t sum = 0;
            for (uint32_t j = 0U; j < k->count; j++) {
                sum += *at - k->in_zero;
                at += k->inner;
            }
            const int32_t value =
                shift_right(high_product(shift_left(sum, k->left), k->multiplier), k->right);
            *output = (int8_t)clamped(value + k->out_zero, -128, 127);
            output++;
        }
    }
}

void shoal_pad(const struct shoal_pad *k, const int8_t *input, int8_t *output)
{
    uint32_t at[4];
    for (at[0] = 0U; at[0] < k->out_size[0]; at[0]++) {
        for (at[1] = 0U; at[1] < k->out_size[1]; at[1]++) {
            for (at[2] = 0U; at[2] < k->out_size[2]; at[2]++) {
                uint32_t inside = 1U;
                for (uint32_t axis = 0U; axis < 3U; axis++) {
                    if ((at[axis] < k->before[axis]) ||
                        (at[axis] - k->before[axis] >= k->in_size[axis])) {
                        inside = 0U;
                    }
                }
                memset(output, k->value, k->out_size[3]);
                if (inside != 0U) {
                    memcpy(output + k->before[3], input, k->in_size[3]);
                    input += k->in_size[3];
                }
                output += k->out_size[3];
            }
        }
    }
}

void shoal_slice(const struct shoal_slice *k, const int8_t *input, int8_t *output)
{
    for (uint32_t n = 0U; n < k->out_size[0]; n++) {
        for (uint32_t y = 0U; y < k->out_size[1]; y++) {
            const int8_t *from = input + k->offset + n * k->step[0] + y * k->step[1];
            for (uint32_t x = 0U; x < k->out_size[2]; x++) {
                memcpy(output, from, k->out_size[3]);
                output += k->out_size[3];
                from += k->step[2];
            }
        }
    }
}

void shoal_copy_rows(const int8_t *input, int8_t *output, uint32_t rows, uint32_t row_bytes,
                     uint32_t out_step)
{
    for (uint32_t row = 0U; row < rows; row++) {
        memcpy(output, input, row_bytes);
        input += row_bytes;
        output += out_step;
    }
}

/* ---- softmax -------------------------------------------------------------------------------- */

static uint32_t leading_zeros(uint32_t value)
{
#if defined(__GNUC__)
    return (uint32_t)__builtin_clz(value);
#else
    uint32_t count = 0U;
    while ((value & 0x80000000U) == 0U) {
        value <<= 1;
        count++;
    }
    return count;
#endif
}

static int32_t saturating_shift_left(int32_t value, uint32_t bits)
{
    const int64_t wide = (int64_t)value * (1LL << bits);
    if (wide > INT32_MAX) {
        return INT32_MAX;
    }
    return wide < INT32_MIN ? INT32_MIN : (int32_t)wide;
}

/* 1 / (1 + x), x in [0, 1], Q0.31: three Newton steps from 48/17 - 32/17 * (1 + x) / 2. */
static int32_t reciprocal_of_one_plus(int32_t x)
{
    const int32_t half = (int32_t)(((int64_t)x + INT32_MAX + 1) / 2);
    int32_t estimate = 1515870810 + high_product(half, -1010580540);
    for (uint32_t step = 0U; step < 3U; step++) {
        const int32_t rest = (1 << 29) - high_product(half, estimate);
        estimate += saturating_shift_left(high_product(estimate, rest), 2U);
    }
    return saturating_shift_left(estimate, 1U);
}

void shoal_softmax(const int32_t *exponentials, uint32_t entries, const int8_t *input,
                   int8_t *output, uint32_t rows, uint32_t row)
{
    for (uint32_t n = 0U; n < rows; n++) {
        int32_t highest = -128;
        for (uint32_t i = 0U; i < row; i++) {
            highest = input[i] > highest ? input[i] : highest;
        }
        int32_t sum = 0; /* Q12.19 */
        for (uint32_t i = 0U; i < row; i++) {
            const uint32_t difference = (uint32_t)(highest - input[i]);
            if (difference < entries) {
                sum += shift_right(exponentials[difference], 12U);
            }
        }
        const uint32_t zeros = leading_zeros((uint32_t)sum);
        const int32_t scale =
            reciprocal_of_one_plus((int32_t)(((uint32_t)sum << zeros) - 0x80000000U));
        for (uint32_t i = 0U; i < row; i++) {
            const uint32_t difference = (uint32_t)(highest - input[i]);
            int32_t value = 0;
            if (difference < entries) {
                value = shift_right(high_product(scale, exponentials[difference]), 35U - zeros);
            }
            output[i] = (int8_t)clamped(value - 128, -128, 127);
        }
        input += row;
        output += row;
    }
}
