/* Flash memory with NOR semantics: erased bytes are 0xFF, programming only clears bits. */
#ifndef SHOAL_FLASH_H
#define SHOAL_FLASH_H

#include <stdbool.h>
#include <stdint.h>

/** Where an address of the flash can be read. */
const uint8_t *shoal_flash_at(uint32_t address);
/** Erase the page of SHOAL_PAGE_BYTES that begins at an address; false for no beginning of one. */
bool shoal_flash_erase(uint32_t address);
/** Program bytes; false where they do not read back. */
bool shoal_flash_program(uint32_t address, const uint8_t *data, uint32_t length);

#endif
