#ifndef SHOAL_SHA256_H
#define SHOAL_SHA256_H

#include <stdint.h>

/** SHA-256 (FIPS 180-4) of a range of bytes; digest: 32 bytes. */
void shoal_sha256(const uint8_t *data, uint32_t length, uint8_t *digest);

#endif
