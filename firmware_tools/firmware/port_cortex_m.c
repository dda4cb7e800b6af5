/* Startup, counter, watchdog and sleep of Arm Cortex-M (Armv6-M, Armv7-M, Armv8-M manuals). */
#include "shoal_bare.h"
#include "shoal_board.h"
#include "shoal_handover.h"
#include "shoal_port.h"
#include "shoal_register.h"
#include "shoal_uart.h"

#include <stddef.h>

#define SYST_CSR SHOAL_REGISTER(0xE000E010U)
#define SYST_RVR SHOAL_REGISTER(0xE000E014U)
#define SYST_CVR SHOAL_REGISTER(0xE000E018U)
#define NVIC_ISER(n) SHOAL_REGISTER(0xE000E100U + (4U * (n)))
#define ICSR SHOAL_REGISTER(0xE000ED04U)
#define VTOR SHOAL_REGISTER(0xE000ED08U)
#define AIRCR SHOAL_REGISTER(0xE000ED0CU)
#define CPACR SHOAL_REGISTER(0xE000ED88U)

#define ICSR_SYSTICK_PENDING (1U << 26)
#define SYSTICK_RELOAD 0x00FFFFFFU

static volatile uint32_t systick_wraps;
static uint32_t core_hz;

extern uint32_t shoal_stack_top[]; /* from the linker script */

int main(void);
void shoal_reset_handler(void);

uint32_t shoal_bare_interrupts_off(void)
{
    uint32_t before;
    __asm volatile("mrs %0, primask\n\tcpsid i" : "=r"(before)::"memory");
    return before;
}

void shoal_bare_interrupts_as(uint32_t before)
{
    __asm volatile("msr primask, %0" ::"r"(before) : "memory");
}

/* The watchdog. */

#if defined(SHOAL_WATCHDOG_CMSDK)
#define WDOG_LOAD SHOAL_REGISTER(SHOAL_WATCHDOG_CMSDK + 0x00U)
#define WDOG_CTRL SHOAL_REGISTER(SHOAL_WATCHDOG_CMSDK + 0x08U)
#define WDOG_INTCLR SHOAL_REGISTER(SHOAL_WATCHDOG_CMSDK + 0x0CU)
#define WDOG_LOCK SHOAL_REGISTER(SHOAL_WATCHDOG_CMSDK + 0xC00U)

static void watchdog_begin(void)
{
    WDOG_LOCK = 0x1ACCE551U;
    WDOG_LOAD = SHOAL_TICK_HZ * (SHOAL_WATCHDOG_S / 2U); /* the second time round it resets */
    WDOG_CTRL = 3U;
    WDOG_LOCK = 0U;
}

void shoal_port_alive(void)
{
    WDOG_LOCK = 0x1ACCE551U;
    WDOG_INTCLR = 1U;
    WDOG_LOCK = 0U;
}
#elif defined(SHOAL_WATCHDOG_STM32)
#define IWDG_KR SHOAL_REGISTER(SHOAL_WATCHDOG_STM32 + 0x00U)
#define IWDG_PR SHOAL_REGISTER(SHOAL_WATCHDOG_STM32 + 0x04U)
#define IWDG_RLR SHOAL_REGISTER(SHOAL_WATCHDOG_STM32 + 0x08U)

static void watchdog_begin(void)
{
    IWDG_KR = 0x5555U;
    IWDG_PR = 6U; /* 32 kHz / 256 = 125 Hz */
    IWDG_RLR = 125U * SHOAL_WATCHDOG_S;
    IWDG_KR = 0xCCCCU;
}

void shoal_port_alive(void)
{
    IWDG_KR = 0xAAAAU;
}
#else
static void watchdog_begin(void)
{
}

void shoal_port_alive(void)
{
}
#endif

/* The clock. */

#if defined(SHOAL_CLOCK_STM32F4)
#define RCC_CR SHOAL_REGISTER(0x40023800U)
#define RCC_PLLCFGR SHOAL_REGISTER(0x40023804U)
#define RCC_CFGR SHOAL_REGISTER(0x40023808U)
#define RCC_APB1ENR SHOAL_REGISTER(0x40023840U)
#define PWR_CR SHOAL_REGISTER(0x40007000U)
#define FLASH_ACR SHOAL_REGISTER(0x40023C00U)
#define READY_TRIES 1000000U

/* RM0090, 7.3 and 3.5: 168 MHz from the internal oscillator, 16 MHz * 336 / 16 / 2. */
static uint32_t clock_begin(void)
{
    FLASH_ACR = SHOAL_POLLED ? 0x105U : 0x705U; /* five wait states, prefetch; caches */
    if ((RCC_CR == 0U) || ((RCC_CFGR & 0xCU) == 8U)) {
        /* An emulator: on silicon the oscillator that we run on shows. Or the bootloader did it. */
        return SHOAL_TICK_HZ;
    }
    RCC_APB1ENR |= 1U << 28;
    PWR_CR |= 1U << 14;
    RCC_PLLCFGR = 16U | (336U << 6) | (7U << 24);
    RCC_CR |= 1U << 24;
    uint32_t tries = READY_TRIES;
    while (((RCC_CR & (1U << 25)) == 0U) && (tries > 0U)) {
        tries--;
    }
    if (tries == 0U) {
        return 16000000U;
    }
    RCC_CFGR = (5U << 10) | (4U << 13) | 2U; /* APB1 / 4, APB2 / 2, the PLL */
    while ((RCC_CFGR & 0xCU) != 8U) {
        /* a few cycles: the PLL is there */
    }
    return SHOAL_TICK_HZ;
}

static uint32_t uart_hz(uint32_t core)
{
    return (core == SHOAL_TICK_HZ) ? (core / 2U) : core;
}
#else
static uint32_t clock_begin(void)
{
    return SHOAL_TICK_HZ;
}

static uint32_t uart_hz(uint32_t core)
{
    return core;
}
#endif

/* The port. */

uint64_t shoal_port_ticks(void)
{
    const uint32_t before = shoal_bare_interrupts_off();
    uint32_t left = SYST_CVR;
    uint64_t wraps = systick_wraps;
    if ((ICSR & ICSR_SYSTICK_PENDING) != 0U) {
        wraps++; /* it wrapped, and its interrupt waits for us */
        left = SYST_CVR;
    }
    shoal_bare_interrupts_as(before);
    return (wraps * (SYSTICK_RELOAD + 1U)) + (SYSTICK_RELOAD - left);
}

uint32_t shoal_port_tick_hz(void)
{
    return core_hz;
}

void shoal_port_reset(bool to_bootloader)
{
    shoal_handover.asked = 1U;
    shoal_handover.stay = to_bootloader ? SHOAL_HANDOVER_STAY : 0U;
    __asm volatile("dsb" ::: "memory");
    AIRCR = 0x05FA0004U;
    for (;;) {
        /* until it happens */
    }
}

/* Startup and interrupts. */

static void fault_handler(void)
{
    __asm volatile("dsb" ::: "memory");
    AIRCR = 0x05FA0004U; /* what went wrong may be anything: begin anew */
    for (;;) {
        /* until it happens */
    }
}

#if !SHOAL_POLLED
static void systick_handler(void)
{
    systick_wraps++;
}

static void uart_handler(void)
{
    shoal_uart_serve();
}
#endif

void shoal_reset_handler(void)
{
#if SHOAL_HAS_FPU
    CPACR |= 0xFU << 20;
    __asm volatile("dsb\n\tisb" ::: "memory");
#endif
    shoal_bare_start();
#if SHOAL_HAS_VTOR
    VTOR = SHOAL_VECTORS;
#endif
    core_hz = clock_begin();
    SYST_RVR = SYSTICK_RELOAD;
    SYST_CVR = 0U;
    SYST_CSR = SHOAL_POLLED ? 5U : 7U; /* with its interrupt, or without */
    shoal_uart_begin(uart_hz(core_hz));
#if !SHOAL_POLLED
    NVIC_ISER(SHOAL_UART_RX_IRQ / 32U) = 1U << (SHOAL_UART_RX_IRQ % 32U);
    NVIC_ISER(SHOAL_UART_TX_IRQ / 32U) = 1U << (SHOAL_UART_TX_IRQ % 32U);
#endif
    watchdog_begin();
    __asm volatile("cpsie i" ::: "memory");
    (void)main();
    fault_handler();
}

/* What the core reads at reset and at interrupts. */
struct vectors {
    uint32_t *stack_top;
    void (*handlers[15 + (SHOAL_POLLED ? 0 : SHOAL_IRQS)])(void);
};

extern const struct vectors shoal_vectors;
__attribute__((section(".vectors"), used)) const struct vectors shoal_vectors = {
    shoal_stack_top,
    {
        [0] = shoal_reset_handler,
        [1] = fault_handler, /* NMI: the watchdog's first time */
        [2] = fault_handler,
        [3] = fault_handler,
        [4] = fault_handler,
        [5] = fault_handler,
#if !SHOAL_POLLED
        [14] = systick_handler,
        [15 + SHOAL_UART_RX_IRQ] = uart_handler,
#if SHOAL_UART_TX_IRQ != SHOAL_UART_RX_IRQ
        [15 + SHOAL_UART_TX_IRQ] = uart_handler,
#endif
#endif
    },
};
