#include "boot_state.h"

#include "shoal_board.h"
#include "shoal_bytes.h"
#include "shoal_crc.h"
#include "shoal_flash.h"
#include "shoal_sha256.h"

#include <string.h>

#define RECORD_BYTES 32U
#define RECORDS (SHOAL_PAGE_BYTES / RECORD_BYTES) /* the first is the page's header */
#define PAGE_MAGIC 0x45474150U
#define RECORD_MAGIC 0x44524352U
#define ID_BYTES 8U

/* A record: magic, kind or the page's number, slot, the first bytes of the image's SHA-256, CRC. */
#define AT_KIND 4U
#define AT_SLOT 8U
#define AT_ID 12U
#define AT_CRC 28U

uint32_t shoal_boot_slot_address(uint8_t slot)
{
    return (slot == 0U) ? SHOAL_SLOT_0 : SHOAL_SLOT_1;
}

static const uint8_t *slot_at(uint8_t slot)
{
    return shoal_flash_at(shoal_boot_slot_address(slot));
}

bool shoal_boot_is_whole(uint8_t slot)
{
    const uint8_t *header = slot_at(slot);
    const uint32_t length = shoal_bytes_get32(&header[SHOAL_BOOT_AT_LENGTH]);
    uint8_t digest[32];
    if ((shoal_bytes_get32(header) != SHOAL_BOOT_MAGIC) ||
        (shoal_bytes_get32(&header[SHOAL_BOOT_AT_FORMAT]) != 1U) ||
        (length > (SHOAL_SLOT_BYTES - SHOAL_BOOT_HEADER_BYTES)) ||
        (shoal_crc32(0U, header, SHOAL_BOOT_AT_CRC) !=
         shoal_bytes_get32(&header[SHOAL_BOOT_AT_CRC]))) {
        return false;
    }
    shoal_sha256(&header[SHOAL_BOOT_HEADER_BYTES], length, digest);
    return memcmp(digest, &header[SHOAL_BOOT_AT_SHA256], sizeof digest) == 0;
}

/* The log. */

static bool counts(const uint8_t *record, uint32_t magic)
{
    return (shoal_bytes_get32(record) == magic) &&
           (shoal_crc32(0U, record, AT_CRC) == shoal_bytes_get32(&record[AT_CRC]));
}

static const uint8_t *record_at(uint32_t page, uint32_t index)
{
    return shoal_flash_at(page + (index * RECORD_BYTES));
}

static uint32_t number_of(uint32_t page)
{
    const uint8_t *header = shoal_flash_at(page);
    return counts(header, PAGE_MAGIC) ? shoal_bytes_get32(&header[AT_KIND]) : 0U;
}

/* The page that counts: the whole one with the higher number. 0 where there is none. */
static uint32_t active_page(void)
{
    const uint32_t first = number_of(SHOAL_STATE_0);
    const uint32_t second = number_of(SHOAL_STATE_1);
    if ((first == 0U) && (second == 0U)) {
        return 0U;
    }
    return (first > second) ? SHOAL_STATE_0 : SHOAL_STATE_1;
}

static bool is_blank(const uint8_t *record)
{
    for (uint32_t i = 0U; i < RECORD_BYTES; i++) {
        if (record[i] != 0xFFU) {
            return false;
        }
    }
    return true;
}

static bool program(uint32_t address, uint32_t magic, uint32_t kind, uint32_t slot,
                    const uint8_t *id)
{
    uint8_t record[RECORD_BYTES];
    (void)memset(record, 0, sizeof record);
    shoal_bytes_put32(record, magic);
    shoal_bytes_put32(&record[AT_KIND], kind);
    shoal_bytes_put32(&record[AT_SLOT], slot);
    (void)memcpy(&record[AT_ID], id, ID_BYTES);
    shoal_bytes_put32(&record[AT_CRC], shoal_crc32(0U, record, AT_CRC));
    return shoal_flash_program(address, record, RECORD_BYTES);
}

/* Index of the last record that counts for the image in a slot, 0 where there is none. */
static uint32_t find(uint32_t page, uint32_t kind, uint8_t slot)
{
    uint32_t found = 0U;
    if (page == 0U) {
        return 0U;
    }
    for (uint32_t i = 1U; i < RECORDS; i++) {
        const uint8_t *record = record_at(page, i);
        if (!counts(record, RECORD_MAGIC) || (shoal_bytes_get32(&record[AT_SLOT]) != slot)) {
            continue;
        }
        const uint32_t is = shoal_bytes_get32(&record[AT_KIND]);
        if (is == SHOAL_BOOT_ERASED) {
            found = 0U;
        } else if ((is == kind) &&
                   (memcmp(&record[AT_ID], &slot_at(slot)[SHOAL_BOOT_AT_SHA256], ID_BYTES) == 0)) {
            found = i;
        } else {
            /* of another image, or of another kind */
        }
    }
    return found;
}

static bool add(uint32_t page, uint32_t kind, uint8_t slot)
{
    for (uint32_t i = 1U; i < RECORDS; i++) {
        if (is_blank(record_at(page, i))) {
            return program(page + (i * RECORD_BYTES), RECORD_MAGIC, kind, slot,
                           &slot_at(slot)[SHOAL_BOOT_AT_SHA256]);
        }
    }
    return false;
}

/* Copy what counts to the other page; its header comes last and makes it the active one. */
static uint32_t renew(uint32_t page)
{
    static const uint8_t no_id[ID_BYTES] = {0};
    const uint32_t other = (page == SHOAL_STATE_0) ? SHOAL_STATE_1 : SHOAL_STATE_0;
    if (!shoal_flash_erase(other)) {
        return 0U;
    }
    /* Which was confirmed first decides nothing but the order: keep it. */
    const bool second_first =
        find(page, SHOAL_BOOT_CONFIRMED, 0U) > find(page, SHOAL_BOOT_CONFIRMED, 1U);
    for (uint8_t i = 0U; i < 2U; i++) {
        const uint8_t slot = second_first ? (uint8_t)(1U - i) : i;
        for (uint32_t kind = SHOAL_BOOT_TRIED; kind <= SHOAL_BOOT_CONFIRMED; kind++) {
            if ((find(page, kind, slot) != 0U) && !add(other, kind, slot)) {
                return 0U;
            }
        }
    }
    const uint32_t number = (page == 0U) ? 1U : (number_of(page) + 1U);
    return program(other, PAGE_MAGIC, number, 0U, no_id) ? other : 0U;
}

bool shoal_boot_record(uint32_t kind, uint8_t slot)
{
    uint32_t page = active_page();
    if ((page != 0U) && add(page, kind, slot)) {
        return true;
    }
    page = renew(page);
    return (page != 0U) && add(page, kind, slot);
}

bool shoal_boot_recorded(uint32_t kind, uint8_t slot)
{
    return find(active_page(), kind, slot) != 0U;
}

/* The slot that shoal_boot_protected told last. It stays needed, whatever is written to the other:
 * hashes of both for every block would take minutes. */
static uint8_t needed;
static bool needed_is_known;

/* The choice. */

static uint32_t version_of(uint8_t slot)
{
    return shoal_bytes_get32(&slot_at(slot)[SHOAL_BOOT_AT_VERSION]);
}

struct facts {
    bool whole[2];
    bool tried[2];
    uint32_t confirmed[2]; /* the later, the higher; 0: not */
};

static void read_facts(struct facts *facts)
{
    const uint32_t page = active_page();
    for (uint8_t slot = 0U; slot < 2U; slot++) {
        facts->whole[slot] = shoal_boot_is_whole(slot);
        facts->tried[slot] = facts->whole[slot] && (find(page, SHOAL_BOOT_TRIED, slot) != 0U);
        facts->confirmed[slot] =
            facts->whole[slot] ? find(page, SHOAL_BOOT_CONFIRMED, slot) : 0U;
    }
}

static uint8_t best_old(const struct facts *facts)
{
    if ((facts->confirmed[0] != 0U) || (facts->confirmed[1] != 0U)) {
        return (uint8_t)((facts->confirmed[0] > facts->confirmed[1]) ? 0U : 1U);
    }
    if (facts->whole[0] && facts->whole[1]) {
        return (uint8_t)((version_of(0U) >= version_of(1U)) ? 0U : 1U);
    }
    if (facts->whole[0]) {
        return 0U;
    }
    return (uint8_t)(facts->whole[1] ? 1U : SHOAL_BOOT_NO_SLOT);
}

struct shoal_boot_choice shoal_boot_choose(void)
{
    struct facts facts;
    read_facts(&facts);
    struct shoal_boot_choice choice = {best_old(&facts), SHOAL_BOOT_KEPT};
    bool fresh[2];
    for (uint8_t slot = 0U; slot < 2U; slot++) {
        fresh[slot] = facts.whole[slot] && !facts.tried[slot] && (facts.confirmed[slot] == 0U);
    }
    if (fresh[0] || fresh[1]) {
        const bool second = fresh[1] && (!fresh[0] || (version_of(1U) > version_of(0U)));
        choice.slot = (uint8_t)(second ? 1U : 0U);
        choice.why = SHOAL_BOOT_TRIAL;
    } else if (choice.slot != SHOAL_BOOT_NO_SLOT) {
        const uint8_t other = (uint8_t)(1U - choice.slot);
        if (facts.tried[other] && (facts.confirmed[other] == 0U)) {
            choice.why = SHOAL_BOOT_RETURNED;
        }
    } else {
        /* there is nothing to start */
    }
    return choice;
}

uint8_t shoal_boot_protected(void)
{
    struct facts facts;
    read_facts(&facts);
    needed = best_old(&facts);
    needed_is_known = needed != SHOAL_BOOT_NO_SLOT;
    return needed;
}

bool shoal_boot_erase_slot(uint8_t slot)
{
    if ((slot > 1U) || (slot == shoal_boot_protected()) ||
        !shoal_boot_record(SHOAL_BOOT_ERASED, slot)) {
        return false;
    }
    const uint32_t begin = shoal_boot_slot_address(slot);
    for (uint32_t at = 0U; at < SHOAL_SLOT_BYTES; at += SHOAL_PAGE_BYTES) {
        if (!shoal_flash_erase(begin + at)) {
            return false;
        }
    }
    return true;
}

static bool inside(uint8_t slot, uint32_t address, uint32_t length)
{
    const uint32_t begin = shoal_boot_slot_address(slot);
    return (address >= begin) && ((address - begin) < SHOAL_SLOT_BYTES) &&
           (length <= (SHOAL_SLOT_BYTES - (address - begin)));
}

bool shoal_boot_write(uint32_t address, const uint8_t *data, uint32_t length)
{
    for (uint8_t slot = 0U; slot < 2U; slot++) {
        if (inside(slot, address, length)) {
            if (!needed_is_known) {
                (void)shoal_boot_protected();
            }
            return (slot != needed) && shoal_flash_program(address, data, length);
        }
    }
    return false;
}
