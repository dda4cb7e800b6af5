#include "shoal_frame.h"

#include "shoal_bytes.h"
#include "shoal_crc.h"

#include <string.h>

/* Decode COBS in place. Returns the length, or -1 for what is no single block of COBS. */
static int32_t cobs_decode(uint8_t *line, uint32_t length)
{
    uint32_t out = 0U;
    uint32_t position = 0U;
    while (position < length) {
        const uint32_t code = line[position];
        const uint32_t end = position + code;
        if ((code == 0U) || (code == 255U) || (end > length)) {
            return -1;
        }
        for (uint32_t i = position + 1U; i < end; i++) {
            line[out] = line[i];
            out++;
        }
        if (end < length) {
            line[out] = 0U;
            out++;
        }
        position = end;
    }
    return (int32_t)out;
}

static bool decode(struct shoal_frame_reader *reader, struct shoal_frame *frame)
{
    const int32_t decoded = cobs_decode(reader->line, reader->length);
    if (decoded < (int32_t)(SHOAL_FRAME_HEADER_BYTES + SHOAL_FRAME_CRC_BYTES)) {
        return false;
    }
    const uint32_t before = (uint32_t)decoded - SHOAL_FRAME_CRC_BYTES;
    if (shoal_crc32(0U, reader->line, before) != shoal_bytes_get32(&reader->line[before])) {
        return false;
    }
    const uint32_t length = before - SHOAL_FRAME_HEADER_BYTES;
    if (length > SHOAL_FRAME_MAX_CONTENT_BYTES) {
        return false;
    }
    frame->kind = reader->line[0];
    frame->status = reader->line[1];
    frame->sequence = shoal_bytes_get16(&reader->line[2]);
    frame->credit_bytes = shoal_bytes_get16(&reader->line[4]);
    frame->length = (uint16_t)length;
    (void)memcpy(frame->content, &reader->line[SHOAL_FRAME_HEADER_BYTES], length);
    return true;
}

enum shoal_frame_event shoal_frame_take(struct shoal_frame_reader *reader, uint8_t byte,
                                        struct shoal_frame *frame)
{
    if (byte != 0U) {
        if (reader->length < (SHOAL_FRAME_MAX_FRAME_BYTES - 1U)) {
            reader->line[reader->length] = byte;
            reader->length++;
        } else {
            reader->too_long = true;
        }
        return SHOAL_FRAME_NONE;
    }
    if (reader->length == 0U) {
        return SHOAL_FRAME_NONE; /* delimiters may repeat */
    }
    const bool whole = !reader->too_long && decode(reader, frame);
    reader->length = 0U;
    reader->too_long = false;
    return whole ? SHOAL_FRAME_WHOLE : SHOAL_FRAME_DAMAGED;
}

/* Where COBS bytes go: the run of non-zero bytes in hand, and the place of its code. */
struct writer {
    uint8_t *line;
    uint32_t code_at;
    uint32_t at;
};

static void put(struct writer *to, const uint8_t *data, uint32_t length)
{
    for (uint32_t i = 0U; i < length; i++) {
        if (data[i] == 0U) {
            to->line[to->code_at] = (uint8_t)(to->at - to->code_at);
            to->code_at = to->at;
        } else {
            to->line[to->at] = data[i];
        }
        to->at++;
    }
}

uint32_t shoal_frame_encode(const struct shoal_frame *frame, uint8_t *line)
{
    if (frame->length > SHOAL_FRAME_MAX_CONTENT_BYTES) {
        return 0U;
    }
    uint8_t head[SHOAL_FRAME_HEADER_BYTES];
    head[0] = frame->kind;
    head[1] = frame->status;
    shoal_bytes_put16(&head[2], frame->sequence);
    shoal_bytes_put16(&head[4], frame->credit_bytes);
    const uint32_t crc = shoal_crc32(shoal_crc32(0U, head, SHOAL_FRAME_HEADER_BYTES),
                                     frame->content, frame->length);
    uint8_t tail[SHOAL_FRAME_CRC_BYTES];
    shoal_bytes_put32(tail, crc);
    struct writer to = {line, 0U, 1U};
    put(&to, head, SHOAL_FRAME_HEADER_BYTES);
    put(&to, frame->content, frame->length);
    put(&to, tail, SHOAL_FRAME_CRC_BYTES);
    line[to.code_at] = (uint8_t)(to.at - to.code_at);
    line[to.at] = 0U;
    return to.at + 1U;
}
