/* An image in a slot of the bootloader. */
#include "shoal_slot.h"

#include "boot_state.h"
#include "shoal_board.h"
#include "shoal_handover.h"

uint8_t shoal_slot_running(void)
{
    return SHOAL_SLOT;
}

uint8_t shoal_slot_trial(void)
{
    return (uint8_t)shoal_handover.trial;
}

void shoal_slot_confirm(void)
{
    if ((shoal_handover.trial == SHOAL_BOOT_TRIAL) &&
        shoal_boot_record(SHOAL_BOOT_CONFIRMED, SHOAL_SLOT)) {
        shoal_handover.trial = SHOAL_BOOT_KEPT;
    }
}

bool shoal_slot_roll_back(void)
{
    const uint8_t other = (uint8_t)(1U - SHOAL_SLOT);
    /* Of two confirmed images the one that was confirmed last is kept. */
    return shoal_boot_is_whole(other) && shoal_boot_recorded(SHOAL_BOOT_CONFIRMED, other) &&
           shoal_boot_record(SHOAL_BOOT_CONFIRMED, other);
}
