/* Serial frames: COBS, CRC-32. Layouts are in the generated shoal_frames.h. */
#ifndef SHOAL_FRAME_H
#define SHOAL_FRAME_H

#include "shoal_frames.h"

#include <stdbool.h>
#include <stdint.h>

/** A whole frame; `content` has room for the longest. */
struct shoal_frame {
    uint8_t kind;
    uint8_t status;
    uint16_t sequence;
    uint16_t credit_bytes;
    uint16_t length; /* of content, 0 to SHOAL_FRAME_MAX_CONTENT_BYTES */
    uint8_t content[SHOAL_FRAME_MAX_CONTENT_BYTES];
};

/** Collects the bytes of a line until a frame ends. Begin with all zero. */
struct shoal_frame_reader {
    uint16_t length;
    bool too_long;
    uint8_t line[SHOAL_FRAME_MAX_FRAME_BYTES];
};

enum shoal_frame_event {
    SHOAL_FRAME_NONE,   /* no frame ends here */
    SHOAL_FRAME_WHOLE,  /* `frame` holds one */
    SHOAL_FRAME_DAMAGED /* one ended that was not whole; `frame` is not to be used */
};

/** Take one byte from the line. Never fails: damage is an event. */
enum shoal_frame_event shoal_frame_take(struct shoal_frame_reader *reader, uint8_t byte,
                                        struct shoal_frame *frame);

/**
 * Write a frame as it goes on the line, its delimiter included.
 *
 * line: room for SHOAL_FRAME_MAX_FRAME_BYTES. Returns how many bytes were written, 0 where
 * frame->length is out of range.
 */
uint32_t shoal_frame_encode(const struct shoal_frame *frame, uint8_t *line);

#endif
