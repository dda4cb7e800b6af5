/*
 * Flash of the STM32F405 (reference manual RM0090, 3.5 to 3.8), at 2.7 to 3.6 V: words at once.
 *
 * Its sectors are 16, 64 and 128 KiB. A page of SHOAL_PAGE_BYTES inside of a larger sector is
 * erased with that sector's first page: erase from the beginning of a sector on.
 */
#include "shoal_board.h"
#include "shoal_bytes.h"
#include "shoal_flash.h"
#include "shoal_register.h"

#define FLASH_ACR SHOAL_REGISTER(0x40023C00U)
#define FLASH_KEYR SHOAL_REGISTER(0x40023C04U)
#define FLASH_SR SHOAL_REGISTER(0x40023C0CU)
#define FLASH_CR SHOAL_REGISTER(0x40023C10U)

#define ACR_CACHES (3U << 9)
#define ACR_CACHE_RESETS (3U << 11)
#define SR_BUSY (1U << 16)
#define SR_ERRORS 0xF2U
#define CR_PROGRAM 1U
#define CR_SECTOR_ERASE 2U
#define CR_WORDS (2U << 8)
#define CR_START (1U << 16)
#define CR_LOCK (1U << 31)

#define FLASH_BEGIN 0x08000000U
#define FLASH_BYTES 0x00100000U
#define LARGE_SECTOR_BYTES 0x00020000U

const uint8_t *shoal_flash_at(uint32_t address)
{
    return (const uint8_t *)(uintptr_t)address;
}

static bool wait(void)
{
    /* The core stands still while it would fetch from a busy flash: this is no long loop. */
    while ((FLASH_SR & SR_BUSY) != 0U) {
    }
    return (FLASH_SR & SR_ERRORS) == 0U;
}

static void unlock(void)
{
    if ((FLASH_CR & CR_LOCK) != 0U) {
        FLASH_KEYR = 0x45670123U;
        FLASH_KEYR = 0xCDEF89ABU;
    }
    FLASH_SR = SR_ERRORS; /* cleared by writing ones */
}

/* What was read before may be in a cache. */
static void lock(void)
{
    FLASH_CR = CR_LOCK;
#if !SHOAL_POLLED /* the bootloader leaves them off */
    FLASH_ACR &= ~ACR_CACHES;
    FLASH_ACR |= ACR_CACHE_RESETS;
    FLASH_ACR &= ~ACR_CACHE_RESETS;
    FLASH_ACR |= ACR_CACHES;
#endif
}

bool shoal_flash_erase(uint32_t address)
{
    const uint32_t at = address - FLASH_BEGIN;
    if ((at >= FLASH_BYTES) || ((at % SHOAL_PAGE_BYTES) != 0U)) {
        return false;
    }
    uint32_t sector = at / 0x4000U; /* four of 16 KiB, one of 64, then 128 */
    if (at >= LARGE_SECTOR_BYTES) {
        sector = 4U + (at / LARGE_SECTOR_BYTES);
        if ((at % LARGE_SECTOR_BYTES) != 0U) {
            return true;
        }
    } else if (sector > 4U) {
        return true;
    } else {
        /* the first page of a sector */
    }
    unlock();
    FLASH_CR = CR_SECTOR_ERASE | CR_WORDS | (sector << 3);
    FLASH_CR |= CR_START;
    const bool good = wait();
    lock();
    return good;
}

bool shoal_flash_program(uint32_t address, const uint8_t *data, uint32_t length)
{
    if (((address - FLASH_BEGIN) >= FLASH_BYTES) || ((address % 4U) != 0U) ||
        ((length % 4U) != 0U)) {
        return false;
    }
    unlock();
    FLASH_CR = CR_PROGRAM | CR_WORDS;
    bool good = true;
    for (uint32_t i = 0U; i < length; i += 4U) {
        SHOAL_REGISTER(address + i) = shoal_bytes_get32(&data[i]);
        good = wait() && good;
    }
    lock();
    return good && (memcmp(shoal_flash_at(address), data, length) == 0);
}
