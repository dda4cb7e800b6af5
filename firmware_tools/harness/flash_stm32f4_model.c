/*
 * The flash controller of an STM32F405 as the reference manual (RM0090, 3.5 to 3.8) has it, for
 * tests of flash_stm32f4.c on a PC: registers change when the next one is touched.
 *
 * Built with -DSHOAL_REGISTER(address)=(*model_register(address)) before everything else. The
 * flash itself lies at its own address. The last line of output is `ok`, or what is wrong.
 */
#include "boot_state.h"
#include "shoal_board.h"
#include "shoal_flash.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define FLASH 0x08000000U
#define FLASH_BYTES 0x00100000U
#define ACR 0x40023C00U
#define KEYR 0x40023C04U
#define SR 0x40023C0CU
#define CR 0x40023C10U
#define LOCK (1U << 31)

uint32_t *model_register(uint32_t address);

static uint32_t keyr;
static uint32_t sr;
static uint32_t sr_seen;
static uint32_t cr = LOCK;
static uint32_t cr_before = LOCK;
static uint32_t acr = 0x705U;
static uint32_t word;
static uint32_t last;
static uint32_t keys_right;
static unsigned erased;
static bool cache_is_stale;

static void fail(const char *what)
{
    (void)printf("%s\n", what);
    exit(1);
}

static uint8_t *at(uint32_t address)
{
    return (uint8_t *)(uintptr_t)address;
}

static void erase(uint32_t sector)
{
    static const uint32_t kib[12] = {16, 16, 16, 16, 64, 128, 128, 128, 128, 128, 128, 128};
    uint32_t begin = FLASH;
    if (sector > 11U) {
        fail("a sector that there is not");
    }
    for (uint32_t i = 0U; i < sector; i++) {
        begin += kib[i] * 1024U;
    }
    (void)memset(at(begin), 0xFF, kib[sector] * 1024U);
    erased |= 1U << sector;
    cache_is_stale = true;
}

/* What the last access has written comes into force. */
static void settle(void)
{
    if (last == KEYR) {
        const uint32_t wanted = (keys_right == 0U) ? 0x45670123U : 0xCDEF89ABU;
        if (((cr & LOCK) == 0U) || (keyr != wanted)) {
            fail("a wrong key: locked until the next reset");
        }
        keys_right = (keys_right + 1U) % 2U;
        if (keys_right == 0U) {
            cr &= ~LOCK;
            cr_before = cr;
        }
    } else if ((last == SR) && (sr_seen != sr)) {
        sr &= ~sr_seen; /* cleared by writing ones */
    } else if ((last == CR) && (cr != cr_before)) {
        if ((cr_before & LOCK) != 0U) {
            fail("the control register was written while it was locked");
        }
        if ((cr & (1U << 16)) != 0U) {
            if ((cr & 3U) != 2U) {
                fail("an erase that is none of a sector");
            }
            erase((cr >> 3) & 0xFU);
            cr &= ~(1U << 16);
        }
        cr_before = cr;
    } else if (last == ACR) {
        if (((acr & (3U << 11)) != 0U) && ((acr & (3U << 9)) != 0U)) {
            fail("caches are reset only while they are off");
        }
        if ((acr & (3U << 11)) == (3U << 11)) {
            cache_is_stale = false;
        }
    } else if ((last >= FLASH) && (last < (FLASH + FLASH_BYTES))) {
        uint32_t now;
        (void)memcpy(&now, at(last), sizeof now);
        if (((cr & LOCK) != 0U) || ((cr & 0x303U) != 0x201U)) {
            sr |= 1U << 7; /* programming sequence */
        } else {
            now &= word;
            (void)memcpy(at(last), &now, sizeof now);
            cache_is_stale = true;
        }
    } else {
        /* nothing was written */
    }
    last = 0U;
}

uint32_t *model_register(uint32_t address)
{
    settle();
    last = address;
    sr_seen = sr;
    switch (address) {
    case ACR:
        return &acr;
    case KEYR:
        return &keyr;
    case SR:
        return &sr_seen;
    case CR:
        return &cr;
    default:
        if ((address < FLASH) || (address >= (FLASH + FLASH_BYTES)) || ((address % 4U) != 0U)) {
            fail("an address that is no register and no word of the flash");
        }
        return &word;
    }
}

static void expect(bool good, const char *what)
{
    settle();
    if (!good) {
        fail(what);
    }
    if (((cr & LOCK) == 0U) || cache_is_stale || (acr != 0x705U)) {
        fail("the flash was left unlocked, or its caches as they were");
    }
}

static bool all(uint32_t begin, uint32_t length, uint8_t value)
{
    for (uint32_t i = 0U; i < length; i++) {
        if (at(begin)[i] != value) {
            return false;
        }
    }
    return true;
}

int main(void)
{
    static const uint8_t some[8] = {1U, 2U, 3U, 4U, 5U, 6U, 7U, 8U};
    static const uint8_t other[8] = {0xFEU, 0xFFU, 0xFFU, 0xFFU, 0xFFU, 0xFFU, 0xFFU, 0xFFU};
    void *flash = mmap(at(FLASH), FLASH_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (flash != (void *)at(FLASH)) {
        fail("the flash's address is not free here");
    }
    (void)memset(flash, 0, FLASH_BYTES);

    /* Erase: pages of records alone, a slot's sectors and no other. */
    expect(shoal_flash_erase(SHOAL_STATE_0) && (erased == (1U << 1)), "page of records 0");
    expect(shoal_flash_erase(SHOAL_STATE_1) && (erased == (3U << 1)), "page of records 1");
    erased = 0U;
    expect(shoal_boot_erase_slot(1U), "slot 1 is not erased");
    expect((erased & ~6U) == 0xF00U, "sectors of slot 1");
    expect(all(SHOAL_SLOT_1, SHOAL_SLOT_BYTES, 0xFFU), "slot 1 is not blank");
    expect(all(SHOAL_SLOT_0, SHOAL_SLOT_BYTES, 0U), "slot 0 was touched");
    erased = 0U;
    expect(shoal_boot_erase_slot(0U), "slot 0 is not erased");
    expect((erased & ~6U) == 0x0F0U, "sectors of slot 0");
    expect(all(SHOAL_SLOT_0, SHOAL_SLOT_BYTES, 0xFFU), "slot 0 is not blank");
    expect(all(FLASH, SHOAL_STATE_0 - FLASH, 0U), "the bootloader was touched");
    expect(!shoal_flash_erase(SHOAL_SLOT_0 + 4U), "no beginning of a page");
    expect(!shoal_flash_erase(FLASH + FLASH_BYTES), "beyond the flash");

    /* Program: whole words, only from ones to zeros, read back. */
    expect(shoal_flash_program(SHOAL_SLOT_0, some, 8U), "eight bytes");
    expect(memcmp(at(SHOAL_SLOT_0), some, 8U) == 0, "they are not there");
    expect(!shoal_flash_program(SHOAL_SLOT_0, other, 8U), "zeros became ones");
    expect(memcmp(at(SHOAL_SLOT_0 + 1U), &some[1], 7U) == 0, "bits were lost");
    expect(!shoal_flash_program(SHOAL_SLOT_0 + 10U, some, 8U), "no word's address");
    expect(!shoal_flash_program(SHOAL_SLOT_0 + 16U, some, 7U), "no whole words");
    expect(!shoal_flash_program(0x20000000U, some, 8U), "not in the flash");
    (void)printf("ok\n");
    return 0;
}
