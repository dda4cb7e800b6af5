/*
 * The bootloader's decisions on a flash that is a file, whose power is cut: for tests.
 *
 * boot_host FLASH CUT ACTION...   actions: choose, start, confirm, erase SLOT, write ADDRESS FILE
 *
 * CUT counts down with every program and erase; at 0 that one is left half done with some bits of
 * the rest done too, and the process ends with status 9. -1 never cuts.
 */
#include "boot_state.h"
#include "shoal_board.h"
#include "shoal_flash.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FLASH_BYTES ((SHOAL_SLOT_1 + SHOAL_SLOT_BYTES) - SHOAL_STATE_0)

static uint8_t flash[FLASH_BYTES];
static const char *path;
static long cut;
static uint32_t noise = 12345U;

static void save(void)
{
    FILE *file = fopen(path, "wb");
    if ((file == NULL) || (fwrite(flash, 1U, FLASH_BYTES, file) != FLASH_BYTES) ||
        (fclose(file) != 0)) {
        exit(1);
    }
}

static uint8_t some_bits(void)
{
    noise = (noise * 1664525U) + 1013904223U;
    return (uint8_t)(noise >> 24);
}

const uint8_t *shoal_flash_at(uint32_t address)
{
    return &flash[address - SHOAL_STATE_0];
}

/* The new value of a byte, of which only some bits change where the power is cut. */
static void change(uint32_t address, const uint8_t *data, uint32_t length)
{
    uint8_t *to = &flash[address - SHOAL_STATE_0];
    const bool torn = cut == 0;
    for (uint32_t i = 0U; i < length; i++) {
        const uint8_t wanted = (data == NULL) ? 0xFFU : (uint8_t)(to[i] & data[i]);
        if (!torn || (i < (length / 2U))) {
            to[i] = wanted;
        } else {
            const uint8_t bits = some_bits();
            to[i] = (uint8_t)((to[i] & ~bits) | (wanted & bits));
        }
    }
    if (torn) {
        save();
        exit(9);
    }
    cut = (cut > 0) ? (cut - 1) : cut;
}

bool shoal_flash_erase(uint32_t address)
{
    if ((address % SHOAL_PAGE_BYTES) != 0U) {
        return false;
    }
    change(address, NULL, SHOAL_PAGE_BYTES);
    return true;
}

bool shoal_flash_program(uint32_t address, const uint8_t *data, uint32_t length)
{
    change(address, data, length);
    return memcmp(shoal_flash_at(address), data, length) == 0;
}

static bool write_file(uint32_t address, const char *name)
{
    uint8_t block[256];
    FILE *file = fopen(name, "rb");
    if (file == NULL) {
        exit(1);
    }
    bool good = true;
    uint32_t at = address;
    size_t n = fread(block, 1U, sizeof block, file);
    while (good && (n > 0U)) {
        good = shoal_boot_write(at, block, (uint32_t)n);
        at += (uint32_t)n;
        n = fread(block, 1U, sizeof block, file);
    }
    (void)fclose(file);
    return good;
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        return 1;
    }
    path = argv[1];
    cut = strtol(argv[2], NULL, 10);
    (void)memset(flash, 0xFF, sizeof flash);
    FILE *file = fopen(path, "rb");
    if (file != NULL) {
        (void)fread(flash, 1U, FLASH_BYTES, file);
        (void)fclose(file);
    }
    bool good = true;
    for (int i = 3; good && (i < argc); i++) {
        const struct shoal_boot_choice choice = shoal_boot_choose();
        if (strcmp(argv[i], "choose") == 0) {
            (void)printf("%u %u\n", (unsigned)choice.slot, (unsigned)choice.why);
        } else if (strcmp(argv[i], "start") == 0) {
            good = (choice.why != SHOAL_BOOT_TRIAL) ||
                   shoal_boot_record(SHOAL_BOOT_TRIED, choice.slot);
            (void)printf("%u %u\n", (unsigned)choice.slot, (unsigned)choice.why);
        } else if ((strcmp(argv[i], "confirm") == 0) && ((i + 1) < argc)) {
            i++;
            good = shoal_boot_record(SHOAL_BOOT_CONFIRMED, (uint8_t)atoi(argv[i]));
        } else if ((strcmp(argv[i], "erase") == 0) && ((i + 1) < argc)) {
            i++;
            good = shoal_boot_erase_slot((uint8_t)atoi(argv[i]));
        } else if ((strcmp(argv[i], "write") == 0) && ((i + 2) < argc)) {
            good = write_file((uint32_t)strtoul(argv[i + 1], NULL, 0), argv[i + 2]);
            i += 2;
        } else {
            return 1;
        }
    }
    save();
    return good ? 0 : 2;
}
