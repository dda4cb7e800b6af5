/* Runs one piece on bare metal in QEMU and reports by semihosting: nothing else is linked in, so
 * that its code, its stack and its instructions can be told from everything around them. */
#include <stddef.h>
#include <stdint.h>

#include "harness_case.h" /* harness_inputs, HARNESS_RUNS, harness_piece, HARNESS_ARENA_BYTES */

#define HARNESS_PAINT 0xA5A5A5A5U
#define HARNESS_LOOPS 1000000U /* calibration: two instructions each */

extern uint32_t harness_data_from[], harness_data[], harness_data_end[];
extern uint32_t harness_bss[], harness_bss_end[];
extern uint32_t harness_stack[], harness_stack_top[];

static uint8_t harness_arena[HARNESS_ARENA_BYTES] __attribute__((aligned(16)));
static int8_t harness_output[HARNESS_OUTPUT_BYTES];

int main(void);
void harness_reset(void);

#if defined(__riscv)

static uint32_t harness_call(uint32_t number, const void *argument)
{
    register uint32_t a0 __asm__("a0") = number;
    register const void *a1 __asm__("a1") = argument;
    __asm__ volatile(".option push\n\t"
                     ".option norvc\n\t"
                     ".balign 16\n\t"
                     "slli x0, x0, 0x1f\n\t"
                     "ebreak\n\t"
                     "srai x0, x0, 7\n\t"
                     ".option pop\n\t"
                     : "+r"(a0)
                     : "r"(a1)
                     : "memory");
    return a0;
}

static uint32_t harness_ticks(void)
{
    uint32_t count;
    __asm__ volatile(".option push\n\t.option arch, +zicsr\n\tcsrr %0, minstret\n\t.option pop"
                     : "=r"(count));
    return count;
}

static void harness_start_ticks(void)
{
}

static void harness_loop(uint32_t count)
{
    __asm__ volatile("1:\n\taddi %0, %0, -1\n\tbnez %0, 1b" : "+r"(count));
}

__asm__(".section .vectors, \"ax\"\n"
        ".globl harness_entry\n"
        "harness_entry:\n"
        "la sp, harness_stack_top\n"
        "j harness_reset\n"
        ".text\n");

#else

#define HARNESS_SYST ((volatile uint32_t *)0xE000E010U)

static volatile uint32_t harness_wraps;

static uint32_t harness_call(uint32_t number, const void *argument)
{
    register uint32_t r0 __asm__("r0") = number;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

void harness_systick(void);
void harness_systick(void)
{
    harness_wraps++;
}

static void harness_fault(void)
{
    static const char text[] = "FAULT\n";
    (void)harness_call(4U, text);
    (void)harness_call(0x18U, (const void *)0x20023U);
    for (;;) {
    }
}

static void harness_start_ticks(void)
{
    HARNESS_SYST[1] = 0xFFFFFFU;
    HARNESS_SYST[2] = 0U;
    HARNESS_SYST[0] = 7U;
    while (HARNESS_SYST[2] == 0U) { /* loaded with the first tick */
    }
}

static uint32_t harness_ticks(void)
{
    uint32_t wraps;
    uint32_t value;
    do {
        wraps = harness_wraps;
        value = HARNESS_SYST[2];
    } while (wraps != harness_wraps);
    return wraps * 0x1000000U + (0xFFFFFFU - value);
}

static void harness_loop(uint32_t count)
{
    __asm__ volatile(".syntax unified\n\t1:\n\tsubs %0, %0, #1\n\tbne 1b"
                     : "+l"(count)
                     :
                     : "cc");
}

typedef void (*harness_vector)(void);

__attribute__((section(".vectors"), used)) static const harness_vector harness_vectors[16] = {
    (harness_vector)(void *)harness_stack_top,
    harness_reset,
    harness_fault,
    harness_fault,
    harness_fault,
    harness_fault,
    harness_fault,
    NULL,
    NULL,
    NULL,
    NULL,
    harness_fault,
    NULL,
    NULL,
    harness_fault,
    harness_systick,
};

#endif

void harness_reset(void)
{
    uint32_t *to = harness_data;
    for (const uint32_t *from = harness_data_from; to < harness_data_end; from++) {
        *to = *from;
        to++;
    }
    for (to = harness_bss; to < harness_bss_end; to++) {
        *to = 0U;
    }
#if defined(__ARM_FP)
    *(volatile uint32_t *)0xE000ED88U |= 0xFU << 20; /* CPACR: the FPU, and MVE with it */
    __asm__ volatile("dsb\n\tisb");
#endif
    (void)main();
    for (;;) {
    }
}

static void harness_say(const char *text)
{
    (void)harness_call(4U, text);
}

static void harness_number(uint32_t value)
{
    char text[10];
    text[8] = '\n';
    text[9] = '\0';
    for (uint32_t i = 0U; i < 8U; i++) {
        text[7U - i] = "0123456789abcdef"[(value >> (4U * i)) & 15U];
    }
    harness_say(text);
}

static void harness_paint(void)
{
    volatile uint32_t here = 0U;
    const uint32_t count = ((uint32_t)((uintptr_t)&here - (uintptr_t)harness_stack) - 64U) / 4U;
    for (uint32_t i = 0U; i < count; i++) {
        ((volatile uint32_t *)harness_stack)[i] = HARNESS_PAINT;
    }
}

/* From here to the deepest word that was written. */
static uint32_t harness_deepest(const volatile uint32_t *frame)
{
    const uint32_t *at = harness_stack;
    while ((at < harness_stack_top) && (*at == HARNESS_PAINT)) {
        at++;
    }
    return (uint32_t)((uintptr_t)frame - (uintptr_t)at);
}

int main(void)
{
    static char text[2U * HARNESS_OUTPUT_BYTES + 2U];
    volatile uint32_t frame = 0U;
    harness_start_ticks();
    uint32_t begin = harness_ticks();
    harness_loop(HARNESS_LOOPS);
    harness_number(harness_ticks() - begin);
    harness_paint();
    for (uint32_t run = 0U; run < HARNESS_RUNS; run++) {
        begin = harness_ticks();
        HARNESS_PIECE.run(harness_inputs + run * HARNESS_INPUT_BYTES, harness_output,
                          harness_arena);
        const uint32_t ticks = harness_ticks() - begin;
        harness_number(ticks);
        for (uint32_t i = 0U; i < HARNESS_OUTPUT_BYTES; i++) {
            text[2U * i] = "0123456789abcdef"[((uint8_t)harness_output[i]) >> 4];
            text[2U * i + 1U] = "0123456789abcdef"[((uint8_t)harness_output[i]) & 15U];
        }
        text[2U * HARNESS_OUTPUT_BYTES] = '\n';
        text[2U * HARNESS_OUTPUT_BYTES + 1U] = '\0';
        harness_say(text);
    }
    harness_number(harness_deepest(&frame));
#if defined(__riscv)
    static const uint32_t done[2] = {0x20026U, 0U};
    (void)harness_call(0x18U, done);
#else
    (void)harness_call(0x18U, (const void *)0x20026U);
#endif
    return 0;
}
