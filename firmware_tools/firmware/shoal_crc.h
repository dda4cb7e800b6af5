#ifndef SHOAL_CRC_H
#define SHOAL_CRC_H

#include <stdint.h>

/** CRC-32 of zlib over more bytes: begin with crc 0, pass the last result to go on. */
uint32_t shoal_crc32(uint32_t crc, const uint8_t *data, uint32_t length);

#endif
