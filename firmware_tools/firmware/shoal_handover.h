/* The first bytes of RAM: what survives a reset, and what image and bootloader tell each other. */
#ifndef SHOAL_HANDOVER_H
#define SHOAL_HANDOVER_H

#include <stdint.h>

#define SHOAL_HANDOVER_MAGIC 0x53484F41U
#define SHOAL_HANDOVER_STAY 0x424F4F54U /* the bootloader is to stay and listen */

struct shoal_handover {
    uint32_t magic;
    uint32_t resets; /* by the watchdog or a fault */
    uint32_t stay;   /* SHOAL_HANDOVER_STAY or 0 */
    uint32_t asked;  /* 1: the next reset was asked for, it is no fault */
    uint32_t trial;  /* what the bootloader says to the image, see shoal_slot.h */
    uint32_t slot;
};

extern struct shoal_handover shoal_handover;

#endif
