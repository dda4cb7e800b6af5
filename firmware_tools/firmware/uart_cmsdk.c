/* CMSDK APB UART (Arm MPS2 and MPS3 boards). */
#include "shoal_board.h"
#include "shoal_port.h"
#include "shoal_register.h"
#include "shoal_uart.h"

#define DATA SHOAL_REGISTER(SHOAL_UART_BASE + 0x00U)
#define STATE SHOAL_REGISTER(SHOAL_UART_BASE + 0x04U)
#define CTRL SHOAL_REGISTER(SHOAL_UART_BASE + 0x08U)
#define INTSTATUS SHOAL_REGISTER(SHOAL_UART_BASE + 0x0CU)
#define BAUDDIV SHOAL_REGISTER(SHOAL_UART_BASE + 0x10U)

#define STATE_TX_FULL 1U
#define STATE_RX_FULL 2U
#define STATE_RX_OVERRUN 8U

void shoal_uart_begin(uint32_t clock_hz)
{
    BAUDDIV = clock_hz / SHOAL_UART_BAUD;
    CTRL = 0x0FU; /* both ways, with interrupts */
}

void shoal_uart_serve(void)
{
    /* Before the data are drained, or an interrupt is lost. */
    INTSTATUS = 0x0FU;
    if ((STATE & STATE_RX_OVERRUN) != 0U) {
        STATE = STATE_RX_OVERRUN;
        shoal_port_overruns++;
    }
    while ((STATE & STATE_RX_FULL) != 0U) {
        if (!shoal_ring_put(&shoal_port_received, (uint8_t)(DATA & 0xFFU))) {
            shoal_port_overruns++;
        }
    }
    uint8_t byte = 0U;
    while (((STATE & STATE_TX_FULL) == 0U) && shoal_ring_take(&shoal_port_to_send, &byte)) {
        DATA = byte;
    }
}
