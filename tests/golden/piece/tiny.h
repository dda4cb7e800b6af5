#ifndef TINY_H
#define TINY_H

#include "shoal_piece.h"

#define TINY_ARENA_BYTES 16
#define TINY_INPUT_BYTES 4
#define TINY_OUTPUT_BYTES 4

extern const struct shoal_piece tiny_piece;

#endif
