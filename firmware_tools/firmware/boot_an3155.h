/* The USART protocol of ST's bootloaders (application note AN3155), so that their tools fit. */
#ifndef BOOT_AN3155_H
#define BOOT_AN3155_H

#include <stdbool.h>
#include <stdint.h>

/** The next byte of the line; false where none came within a second. */
bool shoal_boot_get(uint8_t *byte);
void shoal_boot_put(uint8_t byte);

/** Serve one command, or the byte that wakes a bootloader. Returns true after GO. */
bool shoal_boot_serve(void);

#endif
