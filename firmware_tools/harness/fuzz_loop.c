/*
 * The frame parser and the command loop as a fuzzing target, as libFuzzer calls it.
 *
 * An input is a list of steps. Each begins with a byte that says what it is: bytes as they are, a
 * frame that is whole around any content, one whose fields fit, or a whole inference.
 * Whatever comes, the loop may only send whole frames, a result must be the piece's own, and after
 * it the loop must still answer.
 */
#include "shoal_agent.h"
#include "shoal_bytes.h"
#include "shoal_crc.h"
#include "shoal_image.h"
#include "shoal_port.h"
#include "shoal_slot.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAST_SEQUENCE 4242U
#define MOST_OUTPUT 4096U

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct shoal_ring shoal_port_received;
struct shoal_ring shoal_port_to_send;
volatile uint32_t shoal_port_overruns;

static struct shoal_agent agent;
static struct shoal_frame_reader reader;
static struct shoal_frame reply;
static bool answered;

static void fail(const char *what)
{
    (void)fprintf(stderr, "finding: %s\n", what);
    abort();
}

/* The result that was told against the same piece run once more. */
static void check_result(void)
{
    static int8_t wanted[MOST_OUTPUT];
    static union {
        uint8_t bytes[MOST_OUTPUT];
        uint64_t aligned[2];
    } arena;
    const struct shoal_piece *piece = shoal_image.pieces[agent.result_piece].piece;
    if ((piece->output_bytes > sizeof wanted) || (piece->arena_bytes > sizeof arena.bytes)) {
        fail("the harness is too small for this piece");
    }
    /* A new input may be on its way already. */
    if (shoal_crc32(0U, (const uint8_t *)shoal_image.input, piece->input_bytes) !=
        agent.result_input_crc) {
        return;
    }
    piece->run(shoal_image.input, wanted, &arena);
    const uint32_t inlined = (uint32_t)reply.length - SHOAL_RESULT_HEAD_BYTES;
    if ((memcmp(wanted, &reply.content[SHOAL_RESULT_HEAD_BYTES], inlined) != 0) ||
        (shoal_crc32(0U, (const uint8_t *)wanted, piece->output_bytes) !=
         shoal_bytes_get32(&reply.content[SHOAL_RESULT_HEAD_AT_OUTPUT_CRC]))) {
        fail("a result that is not the piece's");
    }
}

/* A part of the result that was told lies within it, and is it. */
static void check_part(void)
{
    const uint32_t total = shoal_image.pieces[agent.result_piece].piece->output_bytes;
    const uint32_t offset = shoal_bytes_get32(&agent.command.content[SHOAL_READ_AT_OFFSET]);
    const uint32_t length = shoal_bytes_get16(&agent.command.content[SHOAL_READ_AT_LENGTH]);
    if (((uint64_t)offset + length) > total) {
        fail("bytes beyond the result");
    }
    if ((reply.kind == (SHOAL_KIND_READ | SHOAL_REPLY)) &&
        ((reply.length != length) ||
         (memcmp(reply.content, &shoal_image.output[offset], length) != 0))) {
        fail("a part that is not the result's");
    }
}

void shoal_port_send(void)
{
    uint8_t byte = 0U;
    while (shoal_ring_take(&shoal_port_to_send, &byte)) {
        const enum shoal_frame_event event = shoal_frame_take(&reader, byte, &reply);
        if (event == SHOAL_FRAME_DAMAGED) {
            fail("a reply that is no whole frame");
        }
        if (event == SHOAL_FRAME_WHOLE) {
            if ((reply.kind == (SHOAL_KIND_INFER | SHOAL_REPLY)) &&
                (reply.status == SHOAL_STATUS_OK)) {
                check_result();
            }
            if (((reply.kind == (SHOAL_KIND_READ | SHOAL_REPLY)) ||
                 (reply.kind == (SHOAL_KIND_BITS | SHOAL_REPLY))) &&
                (reply.status == SHOAL_STATUS_OK)) {
                check_part();
            }
            answered = answered || ((reply.kind == (SHOAL_KIND_STATISTICS | SHOAL_REPLY)) &&
                                    (reply.sequence == LAST_SEQUENCE) &&
                                    (reply.status == SHOAL_STATUS_OK));
        }
    }
}

void shoal_port_wait(void)
{
}

void shoal_port_alive(void)
{
}

uint64_t shoal_port_ticks(void)
{
    static uint64_t ticks;
    return ticks++;
}

uint32_t shoal_port_tick_hz(void)
{
    return 1000000U;
}

uint32_t shoal_port_stack_bytes(void)
{
    return 0U;
}

uint32_t shoal_port_stack_used_bytes(void)
{
    return 0U;
}

uint32_t shoal_port_resets(void)
{
    return 0U;
}

void shoal_port_reset(bool to_bootloader)
{
    (void)to_bootloader;
    (void)memset(&agent, 0, sizeof agent);
}

/* Bytes on the line, as many at once as there is room for. */
static void feed(const uint8_t *bytes, size_t length)
{
    for (size_t i = 0U; i < length; i++) {
        while (!shoal_ring_put(&shoal_port_received, bytes[i])) {
            (void)shoal_agent_poll(&agent);
        }
    }
    (void)shoal_agent_poll(&agent);
}

static void feed_frame(const struct shoal_frame *frame)
{
    uint8_t line[SHOAL_FRAME_MAX_FRAME_BYTES];
    feed(line, shoal_frame_encode(frame, line));
}

static void put_chunk(struct shoal_frame *frame, uint8_t piece, uint32_t chunk)
{
    const uint32_t total = shoal_image.pieces[piece].piece->input_bytes;
    const uint32_t rest = total - (chunk * SHOAL_FRAME_CHUNK_BYTES);
    frame->kind = SHOAL_KIND_INPUT;
    frame->content[SHOAL_INPUT_HEAD_AT_PIECE] = piece;
    shoal_bytes_put16(&frame->content[SHOAL_INPUT_HEAD_AT_CHUNK], chunk);
    frame->length = (uint16_t)(SHOAL_INPUT_HEAD_BYTES +
                               ((rest < SHOAL_FRAME_CHUNK_BYTES) ? rest : SHOAL_FRAME_CHUNK_BYTES));
}

static uint32_t chunks_of(uint8_t piece)
{
    const uint32_t total = shoal_image.pieces[piece].piece->input_bytes;
    return (total + SHOAL_FRAME_CHUNK_BYTES - 1U) / SHOAL_FRAME_CHUNK_BYTES;
}

static void put_infer(struct shoal_frame *frame, uint8_t piece, uint32_t request)
{
    const uint32_t total = shoal_image.pieces[piece].piece->input_bytes;
    frame->kind = SHOAL_KIND_INFER;
    frame->length = SHOAL_INFER_BYTES;
    frame->content[SHOAL_INFER_AT_PIECE] = piece;
    shoal_bytes_put32(&frame->content[SHOAL_INFER_AT_REQUEST], request);
    shoal_bytes_put32(&frame->content[SHOAL_INFER_AT_INPUT_CRC],
                      shoal_crc32(0U, (const uint8_t *)shoal_image.input, total));
}

/* What a step begins with. */
#define BYTES_AS_THEY_ARE 64U
#define ANY_FRAME 128U
#define INFER_THAT_FITS 160U
#define CHUNK_THAT_FITS 192U
#define ABOUT_THE_RESULT 224U

static size_t step(const uint8_t *data, size_t size)
{
    static struct shoal_frame frame;
    static const uint8_t about[] = {SHOAL_KIND_READ, SHOAL_KIND_BITS, SHOAL_KIND_ANSWER};
    static const uint16_t sizes[] = {SHOAL_READ_BYTES, SHOAL_BITS_BYTES, SHOAL_ANSWER_BYTES};
    const uint8_t what = data[0];
    if ((what < BYTES_AS_THEY_ARE) || (size < 3U)) {
        const size_t length = ((size_t)what < size) ? (size_t)what : (size - 1U);
        feed(&data[1], length);
        return length + 1U;
    }
    const size_t left = size - 3U;
    const size_t length = (data[2] < left) ? data[2] : left;
    const size_t room = SHOAL_FRAME_MAX_CONTENT_BYTES;
    const uint8_t piece = (uint8_t)(data[1] % shoal_image.n_pieces);
    (void)memset(&frame, 0, sizeof frame);
    frame.sequence = data[1];
    frame.length = (uint16_t)((length < room) ? length : room);
    (void)memcpy(frame.content, &data[3], frame.length);
    if (what < ANY_FRAME) {
        frame.kind = ((what & 1U) != 0U) ? (data[1] & 0x0FU) : data[1];
    } else if (what < INFER_THAT_FITS) {
        put_infer(&frame, piece, shoal_bytes_get32(&frame.content[SHOAL_INFER_AT_REQUEST]));
    } else if (what < CHUNK_THAT_FITS) {
        put_chunk(&frame, piece, what % chunks_of(piece));
    } else if (what < ABOUT_THE_RESULT) {
        frame.kind = about[what % 3U];
        frame.length = sizes[what % 3U];
        shoal_bytes_put32(frame.content, agent.result_request);
        if (agent.has_result && ((what & 8U) != 0U)) {
            /* near the end of the result */
            const uint32_t total = shoal_image.pieces[agent.result_piece].piece->output_bytes;
            shoal_bytes_put32(&frame.content[SHOAL_READ_AT_OFFSET], total - (data[1] % 8U));
            shoal_bytes_put16(&frame.content[SHOAL_READ_AT_LENGTH], data[2] % 16U);
        }
    } else {
        /* A whole inference: every chunk, then INFER. */
        for (uint32_t chunk = 0U; chunk < chunks_of(piece); chunk++) {
            put_chunk(&frame, piece, chunk);
            shoal_bytes_put32(&frame.content[SHOAL_INPUT_HEAD_AT_REQUEST], what);
            feed_frame(&frame);
        }
        put_infer(&frame, piece, what);
    }
    feed_frame(&frame);
    return length + 3U;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    (void)memset(&agent, 0, sizeof agent);
    (void)memset(&reader, 0, sizeof reader);
    (void)memset(&shoal_port_received, 0, sizeof shoal_port_received);
    (void)memset(&shoal_port_to_send, 0, sizeof shoal_port_to_send);
    shoal_agent_begin(&agent);
    for (size_t at = 0U; at < size;) {
        at += step(&data[at], size - at);
    }
    static const uint8_t end = 0U;
    feed(&end, 1U); /* ends whatever stands before */
    static struct shoal_frame last;
    (void)memset(&last, 0, sizeof last);
    last.kind = SHOAL_KIND_STATISTICS;
    last.sequence = LAST_SEQUENCE;
    answered = false;
    feed_frame(&last);
    if (!answered) {
        fail("the loop does not answer any more");
    }
    return 0;
}
