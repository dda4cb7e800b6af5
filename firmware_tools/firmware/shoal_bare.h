/* What ports without an operating system share: port_bare.c for every core, the rest by port_*.c. */
#ifndef SHOAL_BARE_H
#define SHOAL_BARE_H

#include <stdint.h>

/** Before anything else: paint the stack, fill .data and .bss, count an unwanted reset. */
void shoal_bare_start(void);

/** Interrupts off; gives what shoal_bare_interrupts_as takes to have them as before. */
uint32_t shoal_bare_interrupts_off(void);
void shoal_bare_interrupts_as(uint32_t before);

#endif
