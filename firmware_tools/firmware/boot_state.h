/*
 * Two slots for images, and what is remembered of them.
 *
 * A slot begins with a header of SHOAL_BOOT_HEADER_BYTES: magic, version of the header, version of
 * the image, length of what follows the header, its SHA-256, and a CRC-32 of all these.
 *
 * What happened is a log of records in one of two pages. A record counts if its checksum does, and
 * if its slot was not erased since. A full page is copied to the other one, whose header is written
 * last: at every moment one of the two is whole.
 */
#ifndef BOOT_STATE_H
#define BOOT_STATE_H

#include <stdbool.h>
#include <stdint.h>

#define SHOAL_BOOT_MAGIC 0x4C4F4853U
#define SHOAL_BOOT_HEADER_BYTES 1024U
#define SHOAL_BOOT_AT_FORMAT 4U
#define SHOAL_BOOT_AT_VERSION 8U
#define SHOAL_BOOT_AT_LENGTH 12U
#define SHOAL_BOOT_AT_SHA256 16U
#define SHOAL_BOOT_AT_CRC 48U

#define SHOAL_BOOT_NO_SLOT 255U

/* Records. */
#define SHOAL_BOOT_TRIED 1U     /* the image was started, and must confirm itself */
#define SHOAL_BOOT_CONFIRMED 2U /* it did */
#define SHOAL_BOOT_ERASED 3U    /* nothing said of the slot before counts any more */

/* Why an image is started. */
#define SHOAL_BOOT_KEPT 0U     /* it confirmed itself */
#define SHOAL_BOOT_TRIAL 1U    /* it is new */
#define SHOAL_BOOT_RETURNED 2U /* the newer one did not confirm itself */

struct shoal_boot_choice {
    uint8_t slot; /* SHOAL_BOOT_NO_SLOT where no image is whole */
    uint8_t why;
};

/** Where a slot begins. slot: 0 or 1. */
uint32_t shoal_boot_slot_address(uint8_t slot);
/** Whether a slot holds a whole image: header and SHA-256. */
bool shoal_boot_is_whole(uint8_t slot);
/** Add a record about the image that is in a slot. */
bool shoal_boot_record(uint32_t kind, uint8_t slot);
/** Whether a record of this kind counts for the image that is in a slot. */
bool shoal_boot_recorded(uint32_t kind, uint8_t slot);
/** Which image to start. Writes nothing: record SHOAL_BOOT_TRIED before starting a trial. */
struct shoal_boot_choice shoal_boot_choose(void);
/** The slot that may not be written: without it no image might be left. */
uint8_t shoal_boot_protected(void);
/** Erase a slot; false where it is protected. */
bool shoal_boot_erase_slot(uint8_t slot);
/** Program bytes of a slot; false outside the slots, and where the slot is protected. */
bool shoal_boot_write(uint32_t address, const uint8_t *data, uint32_t length);

#endif
