/* Little-endian numbers in byte buffers of any alignment. */
#ifndef SHOAL_BYTES_H
#define SHOAL_BYTES_H

#include <stdint.h>
#include <string.h>

static inline uint16_t shoal_bytes_get16(const uint8_t *at)
{
    return (uint16_t)((uint32_t)at[0] | ((uint32_t)at[1] << 8));
}

static inline uint32_t shoal_bytes_get32(const uint8_t *at)
{
    return (uint32_t)shoal_bytes_get16(at) | ((uint32_t)shoal_bytes_get16(at + 2) << 16);
}

static inline void shoal_bytes_put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value & 0xFFU);
    at[1] = (uint8_t)((value >> 8) & 0xFFU);
}

static inline void shoal_bytes_put32(uint8_t *at, uint32_t value)
{
    shoal_bytes_put16(at, value & 0xFFFFU);
    shoal_bytes_put16(at + 2, value >> 16);
}

static inline void shoal_bytes_put64(uint8_t *at, uint64_t value)
{
    shoal_bytes_put32(at, (uint32_t)(value & 0xFFFFFFFFU));
    shoal_bytes_put32(at + 4, (uint32_t)(value >> 32));
}

/** An IEEE 754 single as its bits. */
static inline void shoal_bytes_put_float(uint8_t *at, float value)
{
    uint32_t bits = 0U;
    (void)memcpy(&bits, &value, sizeof bits);
    shoal_bytes_put32(at, bits);
}

#endif
