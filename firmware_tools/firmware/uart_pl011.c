/* Arm PrimeCell UART PL011 (DDI 0183), as on the Stellaris LM3S6965. */
#include "shoal_board.h"
#include "shoal_port.h"
#include "shoal_register.h"
#include "shoal_uart.h"

#define DR SHOAL_REGISTER(SHOAL_UART_BASE + 0x00U)
#define FR SHOAL_REGISTER(SHOAL_UART_BASE + 0x18U)
#define IBRD SHOAL_REGISTER(SHOAL_UART_BASE + 0x24U)
#define LCRH SHOAL_REGISTER(SHOAL_UART_BASE + 0x2CU)
#define CR SHOAL_REGISTER(SHOAL_UART_BASE + 0x30U)
#define IMSC SHOAL_REGISTER(SHOAL_UART_BASE + 0x38U)
#define ICR SHOAL_REGISTER(SHOAL_UART_BASE + 0x44U)

#define FR_RX_EMPTY (1U << 4)
#define FR_TX_FULL (1U << 5)
#define DR_OVERRUN (1U << 11)

void shoal_uart_begin(uint32_t clock_hz)
{
    IBRD = clock_hz / (16U * SHOAL_UART_BAUD);
    LCRH = 0x60U; /* 8 bits, no FIFO: every byte interrupts */
    CR = 0x301U;
    IMSC = 0x70U; /* receive, transmit, receive timeout */
}

void shoal_uart_serve(void)
{
    ICR = 0x7F0U;
    while ((FR & FR_RX_EMPTY) == 0U) {
        const uint32_t data = DR;
        if ((data & DR_OVERRUN) != 0U) {
            shoal_port_overruns++;
        }
        if (!shoal_ring_put(&shoal_port_received, (uint8_t)(data & 0xFFU))) {
            shoal_port_overruns++;
        }
    }
    uint8_t byte = 0U;
    while (((FR & FR_TX_FULL) == 0U) && shoal_ring_take(&shoal_port_to_send, &byte)) {
        DR = byte;
    }
}
