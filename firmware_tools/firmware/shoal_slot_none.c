/* An image that runs without a bootloader. */
#include "shoal_slot.h"

uint8_t shoal_slot_running(void)
{
    return SHOAL_SLOT_NONE;
}

uint8_t shoal_slot_trial(void)
{
    return 0U;
}

void shoal_slot_confirm(void)
{
}

bool shoal_slot_roll_back(void)
{
    return false;
}
