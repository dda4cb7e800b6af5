/* USART of the STM32F4 (reference manual RM0090, chapter 30): USART1 on PA9 and PA10. */
#include "shoal_board.h"
#include "shoal_port.h"
#include "shoal_register.h"
#include "shoal_uart.h"

#define RCC_AHB1ENR SHOAL_REGISTER(0x40023830U)
#define RCC_APB2ENR SHOAL_REGISTER(0x40023844U)
#define GPIOA_MODER SHOAL_REGISTER(0x40020000U)
#define GPIOA_PUPDR SHOAL_REGISTER(0x4002000CU)
#define GPIOA_AFRH SHOAL_REGISTER(0x40020024U)
#define SR SHOAL_REGISTER(SHOAL_UART_BASE + 0x00U)
#define DR SHOAL_REGISTER(SHOAL_UART_BASE + 0x04U)
#define BRR SHOAL_REGISTER(SHOAL_UART_BASE + 0x08U)
#define CR1 SHOAL_REGISTER(SHOAL_UART_BASE + 0x0CU)

#define SR_TXE (1U << 7)
#define SR_RXNE (1U << 5)
#define SR_ORE (1U << 3)
#if SHOAL_EVEN_PARITY
#define CR1_PARITY ((1U << 12) | (1U << 10)) /* a ninth bit, as the chip's own bootloader has it */
#else
#define CR1_PARITY 0U
#endif
#define CR1_ON (CR1_PARITY | (1U << 13) | (1U << 5) | (1U << 3) | (1U << 2)) /* UE RXNEIE TE RE */
#define CR1_TXEIE (1U << 7)

void shoal_uart_begin(uint32_t clock_hz)
{
    RCC_AHB1ENR |= 1U;
    RCC_APB2ENR |= 1U << 4;
    (void)RCC_APB2ENR; /* the clock is there two cycles later */
    GPIOA_AFRH = (GPIOA_AFRH & ~0xFF0U) | 0x770U;
    GPIOA_PUPDR = (GPIOA_PUPDR & ~(3U << 20)) | (1U << 20); /* RX up: no noise when unplugged */
    GPIOA_MODER = (GPIOA_MODER & ~(0xFU << 18)) | (0xAU << 18);
    CR1 = 0U; /* word length is changed while it is off */
    BRR = (clock_hz + (SHOAL_UART_BAUD / 2U)) / SHOAL_UART_BAUD;
    CR1 = CR1_ON;
}

void shoal_uart_serve(void)
{
    uint32_t state = SR;
    while ((state & (SR_RXNE | SR_ORE)) != 0U) {
        /* An overrun is cleared by reading SR, then DR. */
        const uint8_t byte = (uint8_t)(DR & 0xFFU);
        if ((state & SR_ORE) != 0U) {
            shoal_port_overruns++;
        }
        if (((state & SR_RXNE) != 0U) && !shoal_ring_put(&shoal_port_received, byte)) {
            shoal_port_overruns++;
        }
        state = SR;
    }
    uint8_t byte = 0U;
    while (((SR & SR_TXE) != 0U) && shoal_ring_take(&shoal_port_to_send, &byte)) {
        DR = byte;
    }
    CR1 = (shoal_ring_used(&shoal_port_to_send) > 0U) ? (CR1_ON | CR1_TXEIE) : CR1_ON;
}
