#include "boot_an3155.h"

#include "boot_state.h"
#include "shoal_board.h"
#include "shoal_flash.h"

#define ACK 0x79U
#define NACK 0x1FU
#define WAKE 0x7FU
#define GET 0x00U
#define GET_VERSION 0x01U
#define GET_ID 0x02U
#define READ 0x11U
#define GO 0x21U
#define WRITE 0x31U
#define EXTENDED_ERASE 0x44U
#define PROTOCOL_VERSION 0x31U
#define CHIP_ID 0x413U /* as an STM32F405: pages and addresses are our own */

static void put_all(const uint8_t *bytes, uint32_t length)
{
    for (uint32_t i = 0U; i < length; i++) {
        shoal_boot_put(bytes[i]);
    }
}

static bool answer(bool good)
{
    shoal_boot_put(good ? ACK : NACK);
    return good;
}

/* Bytes and then their XOR, begun with `check`. */
static bool get_checked(uint8_t *bytes, uint32_t length, uint8_t check)
{
    uint8_t sum = check;
    for (uint32_t i = 0U; i < length; i++) {
        if (!shoal_boot_get(&bytes[i])) {
            return false;
        }
        sum ^= bytes[i];
    }
    uint8_t told = 0U;
    return shoal_boot_get(&told) && (told == sum);
}

static bool get_address(uint32_t *address)
{
    uint8_t bytes[4];
    if (!get_checked(bytes, 4U, 0U)) {
        return answer(false);
    }
    *address = ((uint32_t)bytes[0] << 24) | ((uint32_t)bytes[1] << 16) |
               ((uint32_t)bytes[2] << 8) | (uint32_t)bytes[3];
    return answer(true);
}

static bool readable(uint32_t address, uint32_t length)
{
    for (uint8_t slot = 0U; slot < 2U; slot++) {
        const uint32_t begin = shoal_boot_slot_address(slot);
        if ((address >= begin) && ((address - begin) < SHOAL_SLOT_BYTES) &&
            (length <= (SHOAL_SLOT_BYTES - (address - begin)))) {
            return true;
        }
    }
    return false;
}

static void on_read(void)
{
    uint32_t address = 0U;
    uint8_t count = 0U;
    if (!get_address(&address)) {
        return;
    }
    if (get_checked(&count, 1U, 0xFFU) && readable(address, (uint32_t)count + 1U)) {
        (void)answer(true);
        put_all(shoal_flash_at(address), (uint32_t)count + 1U);
    } else {
        (void)answer(false);
    }
}

static void on_write(void)
{
    static uint8_t bytes[256];
    uint32_t address = 0U;
    uint8_t count = 0U;
    if (!get_address(&address)) {
        return;
    }
    (void)answer(shoal_boot_get(&count) && get_checked(bytes, (uint32_t)count + 1U, count) &&
                 shoal_boot_write(address, bytes, (uint32_t)count + 1U));
}

/* Only the erasure of all is known; it spares the slot without which no image might be left. */
static void on_erase(void)
{
    uint8_t what[2];
    if (!get_checked(what, 2U, 0U) || (what[0] != 0xFFU) || (what[1] != 0xFFU)) {
        (void)answer(false);
        return;
    }
    const uint8_t spared = shoal_boot_protected();
    bool good = true;
    for (uint8_t slot = 0U; slot < 2U; slot++) {
        if (slot != spared) {
            good = shoal_boot_erase_slot(slot) && good;
        }
    }
    (void)answer(good);
}

bool shoal_boot_serve(void)
{
    static const uint8_t get[] = {
        7U, PROTOCOL_VERSION, GET, GET_VERSION, GET_ID, READ, GO, WRITE, EXTENDED_ERASE, ACK,
    };
    static const uint8_t version[] = {PROTOCOL_VERSION, 0U, 0U, ACK};
    static const uint8_t id[] = {1U, CHIP_ID >> 8, CHIP_ID & 0xFFU, ACK};
    uint8_t command = 0U;
    uint8_t complement = 0U;
    uint32_t address = 0U;
    if (!shoal_boot_get(&command)) {
        return false;
    }
    if (command == WAKE) {
        (void)answer(true);
        return false;
    }
    if (!shoal_boot_get(&complement) || ((command ^ complement) != 0xFFU)) {
        (void)answer(false);
        return false;
    }
    bool go = false;
    switch (command) {
    case GET:
        (void)answer(true);
        put_all(get, sizeof get);
        break;
    case GET_VERSION:
        (void)answer(true);
        put_all(version, sizeof version);
        break;
    case GET_ID:
        (void)answer(true);
        put_all(id, sizeof id);
        break;
    case READ:
        (void)answer(true);
        on_read();
        break;
    case WRITE:
        (void)answer(true);
        on_write();
        break;
    case EXTENDED_ERASE:
        (void)answer(true);
        on_erase();
        break;
    case GO:
        (void)answer(true);
        go = get_address(&address);
        break;
    default:
        (void)answer(false);
        break;
    }
    return go;
}
