#include "shoal_sha256.h"

#include "shoal_bytes.h"

#include <string.h>

static const uint32_t rounds[64] = {
    0x428A2F98U, 0x71374491U, 0xB5C0FBCFU, 0xE9B5DBA5U, 0x3956C25BU, 0x59F111F1U,
    0x923F82A4U, 0xAB1C5ED5U, 0xD807AA98U, 0x12835B01U, 0x243185BEU, 0x550C7DC3U,
    0x72BE5D74U, 0x80DEB1FEU, 0x9BDC06A7U, 0xC19BF174U, 0xE49B69C1U, 0xEFBE4786U,
    0x0FC19DC6U, 0x240CA1CCU, 0x2DE92C6FU, 0x4A7484AAU, 0x5CB0A9DCU, 0x76F988DAU,
    0x983E5152U, 0xA831C66DU, 0xB00327C8U, 0xBF597FC7U, 0xC6E00BF3U, 0xD5A79147U,
    0x06CA6351U, 0x14292967U, 0x27B70A85U, 0x2E1B2138U, 0x4D2C6DFCU, 0x53380D13U,
    0x650A7354U, 0x766A0ABBU, 0x81C2C92EU, 0x92722C85U, 0xA2BFE8A1U, 0xA81A664BU,
    0xC24B8B70U, 0xC76C51A3U, 0xD192E819U, 0xD6990624U, 0xF40E3585U, 0x106AA070U,
    0x19A4C116U, 0x1E376C08U, 0x2748774CU, 0x34B0BCB5U, 0x391C0CB3U, 0x4ED8AA4AU,
    0x5B9CCA4FU, 0x682E6FF3U, 0x748F82EEU, 0x78A5636FU, 0x84C87814U, 0x8CC70208U,
    0x90BEFFFAU, 0xA4506CEBU, 0xBEF9A3F7U, 0xC67178F2U,
};

static const uint32_t start[8] = {
    0x6A09E667U, 0xBB67AE85U, 0x3C6EF372U, 0xA54FF53AU,
    0x510E527FU, 0x9B05688CU, 0x1F83D9ABU, 0x5BE0CD19U,
};

static uint32_t rotated(uint32_t value, uint32_t by)
{
    return (value >> by) | (value << (32U - by));
}

static void add_block(uint32_t *state, const uint8_t *block)
{
    uint32_t w[64];
    uint32_t s[8];
    for (uint32_t i = 0U; i < 16U; i++) {
        w[i] = __builtin_bswap32(shoal_bytes_get32(&block[4U * i]));
    }
    for (uint32_t i = 16U; i < 64U; i++) {
        const uint32_t a = w[i - 15U];
        const uint32_t b = w[i - 2U];
        w[i] = w[i - 16U] + w[i - 7U] + (rotated(a, 7U) ^ rotated(a, 18U) ^ (a >> 3)) +
               (rotated(b, 17U) ^ rotated(b, 19U) ^ (b >> 10));
    }
    (void)memcpy(s, state, sizeof s);
    for (uint32_t i = 0U; i < 64U; i++) {
        const uint32_t first = s[7] + rounds[i] + w[i] +
                               (rotated(s[4], 6U) ^ rotated(s[4], 11U) ^ rotated(s[4], 25U)) +
                               ((s[4] & s[5]) ^ (~s[4] & s[6]));
        const uint32_t second = (rotated(s[0], 2U) ^ rotated(s[0], 13U) ^ rotated(s[0], 22U)) +
                                ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        for (uint32_t k = 7U; k > 0U; k--) {
            s[k] = s[k - 1U];
        }
        s[4] += first;
        s[0] = first + second;
    }
    for (uint32_t i = 0U; i < 8U; i++) {
        state[i] += s[i];
    }
}

void shoal_sha256(const uint8_t *data, uint32_t length, uint8_t *digest)
{
    uint32_t state[8];
    uint8_t last[64];
    (void)memcpy(state, start, sizeof state);
    uint32_t done = 0U;
    for (; (length - done) >= 64U; done += 64U) {
        add_block(state, &data[done]);
    }
    const uint32_t rest = length - done;
    (void)memset(last, 0, sizeof last);
    (void)memcpy(last, &data[done], rest);
    last[rest] = 0x80U;
    if (rest >= 56U) {
        add_block(state, last);
        (void)memset(last, 0, sizeof last);
    }
    shoal_bytes_put32(&last[56], __builtin_bswap32(length >> 29)); /* the length in bits */
    shoal_bytes_put32(&last[60], __builtin_bswap32(length << 3));
    add_block(state, last);
    for (uint32_t i = 0U; i < 8U; i++) {
        shoal_bytes_put32(&digest[4U * i], __builtin_bswap32(state[i]));
    }
}
