/* What the running image knows of the bootloader. */
#ifndef SHOAL_SLOT_H
#define SHOAL_SLOT_H

#include <stdbool.h>
#include <stdint.h>

#define SHOAL_SLOT_NONE 255U

/** 0 or 1; SHOAL_SLOT_NONE without a bootloader. */
uint8_t shoal_slot_running(void);
/** 1 while the image has not confirmed itself, 2 where the bootloader went back to it, else 0. */
uint8_t shoal_slot_trial(void);
/** Keep this image: it works. May be called again and again. */
void shoal_slot_confirm(void);
/** Keep the image in the other slot instead, from the next reset on; false where there is none that
 * was ever confirmed. */
bool shoal_slot_roll_back(void);

#endif
