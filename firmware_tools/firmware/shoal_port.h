/* What a board gives to the agent loop. Implemented by port_*.c. */
#ifndef SHOAL_PORT_H
#define SHOAL_PORT_H

#include "shoal_ring.h"

#include <stdbool.h>
#include <stdint.h>

/** Bytes that came; the UART's interrupt puts them. */
extern struct shoal_ring shoal_port_received;
/** Bytes to send; the UART's interrupt takes them. */
extern struct shoal_ring shoal_port_to_send;
/** Bytes that the UART or the ring lost. */
extern volatile uint32_t shoal_port_overruns;

/** Make the UART send what waits in shoal_port_to_send; returns at once. */
void shoal_port_send(void);
/** Sleep until something may have happened. */
void shoal_port_wait(void);
/** Tell the watchdog that the loop turns. */
void shoal_port_alive(void);
/** A counter of shoal_port_tick_hz() a second that never wraps. */
uint64_t shoal_port_ticks(void);
uint32_t shoal_port_tick_hz(void);
/** Room for the stack, bytes. */
uint32_t shoal_port_stack_bytes(void);
/** The most that was ever used of it, bytes: what was painted and is altered. */
uint32_t shoal_port_stack_used_bytes(void);
/** Resets by the watchdog or a fault since power on, as far as memory survived. */
uint32_t shoal_port_resets(void);
/** Reset the board; where it is emulated by a process, right after this returns. */
void shoal_port_reset(bool to_bootloader);

#endif
