/* What every port without an operating system does alike: memory at the start, rings, sleep. */
#include "shoal_bare.h"
#include "shoal_board.h"
#include "shoal_handover.h"
#include "shoal_port.h"
#include "shoal_uart.h"

#define STACK_PAINT 0xA5A5A5A5U

struct shoal_ring shoal_port_received;
struct shoal_ring shoal_port_to_send;
volatile uint32_t shoal_port_overruns;
struct shoal_handover shoal_handover __attribute__((section(".handover")));

/* From the linker script. */
extern uint32_t shoal_stack_low[];
extern uint32_t shoal_stack_top[];
extern uint32_t shoal_data_from[];
extern uint32_t shoal_data_begin[];
extern uint32_t shoal_data_end[];
extern uint32_t shoal_bss_begin[];
extern uint32_t shoal_bss_end[];

/* Addresses of different symbols are compared as numbers, which C allows. */
static inline bool below(const volatile uint32_t *word, const volatile void *end)
{
    return (uintptr_t)word < (uintptr_t)end;
}

void shoal_port_send(void)
{
    const uint32_t before = shoal_bare_interrupts_off();
    shoal_uart_serve();
    shoal_bare_interrupts_as(before);
}

void shoal_port_wait(void)
{
    /* A pending interrupt ends the sleep also while interrupts are off: none slips in between. */
    const uint32_t before = shoal_bare_interrupts_off();
    if (shoal_ring_used(&shoal_port_received) == 0U) {
        __asm__ volatile("wfi" ::: "memory");
    }
    shoal_bare_interrupts_as(before);
}

uint32_t shoal_port_stack_bytes(void)
{
    return (uint32_t)((uintptr_t)shoal_stack_top - (uintptr_t)shoal_stack_low);
}

uint32_t shoal_port_stack_used_bytes(void)
{
    const volatile uint32_t *word = shoal_stack_low;
    while (below(word, shoal_stack_top) && (*word == STACK_PAINT)) {
        word++;
    }
    return (uint32_t)((uintptr_t)shoal_stack_top - (uintptr_t)word);
}

uint32_t shoal_port_resets(void)
{
    return shoal_handover.resets;
}

void shoal_bare_start(void)
{
#if !SHOAL_POLLED
    for (volatile uint32_t *word = shoal_stack_low;
         below(word + 16, __builtin_frame_address(0)); word++) {
        *word = STACK_PAINT;
    }
#endif
    const uint32_t *from = shoal_data_from;
    for (volatile uint32_t *to = shoal_data_begin; below(to, shoal_data_end); to++) {
        *to = *from;
        from++;
    }
    for (volatile uint32_t *to = shoal_bss_begin; below(to, shoal_bss_end); to++) {
        *to = 0U;
    }
    if (shoal_handover.magic != SHOAL_HANDOVER_MAGIC) {
        shoal_handover = (struct shoal_handover){.magic = SHOAL_HANDOVER_MAGIC};
    } else if (shoal_handover.asked != 1U) {
        shoal_handover.resets++;
    } else {
        /* it was wanted */
    }
    shoal_handover.asked = 0U;
}
