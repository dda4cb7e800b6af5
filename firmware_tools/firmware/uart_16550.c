/* 16550 UART with byte-wide registers, as on QEMU's RISC-V virt board. */
#include "shoal_board.h"
#include "shoal_port.h"
#include "shoal_uart.h"

#define REGISTER(offset) (*(volatile uint8_t *)(uintptr_t)(SHOAL_UART_BASE + (offset)))
#define DATA REGISTER(0U)
#define IER REGISTER(1U)
#define FCR REGISTER(2U)
#define LCR REGISTER(3U)
#define LSR REGISTER(5U)

#define LSR_READY 1U
#define LSR_OVERRUN 2U
#define LSR_TX_EMPTY 0x20U
#define IER_RECEIVE 1U
#define IER_TRANSMIT 2U

void shoal_uart_begin(uint32_t clock_hz)
{
    const uint32_t divisor = clock_hz / (16U * SHOAL_UART_BAUD);
    LCR = 0x80U;
    DATA = (uint8_t)(divisor & 0xFFU);
    IER = (uint8_t)((divisor >> 8) & 0xFFU);
    LCR = 0x03U;
    FCR = 0x01U;
    IER = IER_RECEIVE;
}

void shoal_uart_serve(void)
{
    uint32_t state = LSR;
    while ((state & LSR_READY) != 0U) {
        if ((state & LSR_OVERRUN) != 0U) {
            shoal_port_overruns++;
        }
        if (!shoal_ring_put(&shoal_port_received, DATA)) {
            shoal_port_overruns++;
        }
        state = LSR;
    }
    uint8_t byte = 0U;
    while (((LSR & LSR_TX_EMPTY) != 0U) && shoal_ring_take(&shoal_port_to_send, &byte)) {
        DATA = byte;
    }
    IER = (shoal_ring_used(&shoal_port_to_send) > 0U) ? (IER_RECEIVE | IER_TRANSMIT) : IER_RECEIVE;
}
