/* Startup, counter and sleep of RISC-V in machine mode, with a PLIC (QEMU's virt board). */
#include "shoal_bare.h"
#include "shoal_board.h"
#include "shoal_handover.h"
#include "shoal_port.h"
#include "shoal_register.h"
#include "shoal_uart.h"

#define PLIC_PRIORITY(irq) SHOAL_REGISTER(0x0C000000U + (4U * (irq)))
#define PLIC_ENABLE(n) SHOAL_REGISTER(0x0C002000U + (4U * (n)))
#define PLIC_THRESHOLD SHOAL_REGISTER(0x0C200000U)
#define PLIC_CLAIM SHOAL_REGISTER(0x0C200004U)
#define TEST_FINISHER SHOAL_REGISTER(0x00100000U)
#define FINISHER_RESET 0x7777U
#define MSTATUS_MIE "8"

int main(void);
void shoal_reset_handler(void);
void shoal_begin(void);

uint32_t shoal_bare_interrupts_off(void)
{
    uint32_t before = 0U;
    __asm__ volatile(".option push\n\t.option arch, +zicsr\n\t"
                     "csrrci %0, mstatus, " MSTATUS_MIE "\n\t.option pop"
                     : "=r"(before)::"memory");
    return before & 8U;
}

void shoal_bare_interrupts_as(uint32_t before)
{
    __asm__ volatile(".option push\n\t.option arch, +zicsr\n\t"
                     "csrs mstatus, %0\n\t.option pop" ::"r"(before)
                     : "memory");
}

void shoal_port_alive(void)
{
}

uint64_t shoal_port_ticks(void)
{
    uint32_t high = 0U;
    uint32_t low = 0U;
    uint32_t again = 0U;
    do {
        __asm__ volatile(".option push\n\t.option arch, +zicsr\n\t"
                         "csrr %0, mcycleh\n\tcsrr %1, mcycle\n\tcsrr %2, mcycleh\n\t.option pop"
                         : "=r"(high), "=r"(low), "=r"(again));
    } while (high != again);
    return ((uint64_t)high << 32) | low;
}

uint32_t shoal_port_tick_hz(void)
{
    return SHOAL_TICK_HZ;
}

void shoal_port_reset(bool to_bootloader)
{
    (void)to_bootloader;
    shoal_handover.asked = 1U;
    TEST_FINISHER = FINISHER_RESET;
    for (;;) {
        /* until it happens */
    }
}

static __attribute__((interrupt("machine"), aligned(4))) void trap_handler(void)
{
    uint32_t cause = 0U;
    __asm__ volatile(".option push\n\t.option arch, +zicsr\n\tcsrr %0, mcause\n\t.option pop"
                     : "=r"(cause));
    if (cause != 0x8000000BU) {
        TEST_FINISHER = FINISHER_RESET; /* a fault: begin anew */
        for (;;) {
            /* until it happens */
        }
    }
    const uint32_t irq = PLIC_CLAIM;
    if (irq == SHOAL_UART_RX_IRQ) {
        shoal_uart_serve();
    }
    PLIC_CLAIM = irq;
}

void shoal_begin(void)
{
    shoal_bare_start();
    shoal_uart_begin(SHOAL_TICK_HZ);
    PLIC_PRIORITY(SHOAL_UART_RX_IRQ) = 1U;
    PLIC_ENABLE(SHOAL_UART_RX_IRQ / 32U) = 1U << (SHOAL_UART_RX_IRQ % 32U);
    PLIC_THRESHOLD = 0U;
    __asm__ volatile(".option push\n\t.option arch, +zicsr\n\t"
                     "csrw mtvec, %0\n\tcsrs mie, %1\n\tcsrsi mstatus, " MSTATUS_MIE
                     "\n\t.option pop" ::"r"(trap_handler),
                     "r"(1U << 11)
                     : "memory");
    (void)main();
    shoal_port_reset(false);
}

/* The first instruction of the image. */
__asm__(".section .vectors, \"ax\"\n"
        ".globl shoal_reset_handler\n"
        "shoal_reset_handler:\n"
        "    la sp, shoal_stack_top\n"
        "    j shoal_begin\n"
        ".text\n");
