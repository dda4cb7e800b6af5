/* Flash that is memory, as the file-backed PSRAM of QEMU's MPS2 boards; keeps to NOR semantics. */
#include "shoal_board.h"
#include "shoal_flash.h"

#include <string.h>

static volatile uint8_t *writable(uint32_t address)
{
    return (volatile uint8_t *)(uintptr_t)address;
}

const uint8_t *shoal_flash_at(uint32_t address)
{
    return (const uint8_t *)(uintptr_t)address;
}

bool shoal_flash_erase(uint32_t address)
{
    if ((address % SHOAL_PAGE_BYTES) != 0U) {
        return false;
    }
    for (uint32_t i = 0U; i < SHOAL_PAGE_BYTES; i++) {
        writable(address)[i] = 0xFFU;
    }
    return true;
}

bool shoal_flash_program(uint32_t address, const uint8_t *data, uint32_t length)
{
    for (uint32_t i = 0U; i < length; i++) {
        const uint8_t before = writable(address)[i];
        writable(address)[i] = (uint8_t)(before & data[i]);
    }
    return memcmp(shoal_flash_at(address), data, length) == 0;
}
