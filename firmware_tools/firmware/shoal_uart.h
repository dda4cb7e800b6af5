/* A UART driver: uart_cmsdk.c, uart_stm32.c, uart_pl011.c, uart_16550.c. */
#ifndef SHOAL_UART_H
#define SHOAL_UART_H

#include <stdint.h>

/** Ready to receive and send, interrupts on. clock_hz: of the UART. */
void shoal_uart_begin(uint32_t clock_hz);
/** Move bytes between the UART and the rings: from its interrupt, or with interrupts off. */
void shoal_uart_serve(void);

#endif
