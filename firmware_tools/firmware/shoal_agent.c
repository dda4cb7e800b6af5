#include "shoal_agent.h"

#include "shoal_bytes.h"
#include "shoal_crc.h"
#include "shoal_image.h"
#include "shoal_port.h"
#include "shoal_slot.h"

#include <string.h>

/* The frame's bytes wait in the ring; while it is full, the line is slower than we are. */
static void send(struct shoal_agent *agent)
{
    const uint32_t used = shoal_ring_used(&shoal_port_received);
    agent->reply.credit_bytes = (uint16_t)(SHOAL_RING_BYTES - used);
    const uint32_t length = shoal_frame_encode(&agent->reply, agent->line);
    for (uint32_t i = 0U; i < length; i++) {
        while (!shoal_ring_put(&shoal_port_to_send, agent->line[i])) {
            shoal_port_send();
            shoal_port_alive();
        }
    }
    shoal_port_send();
}

static void copy_text(uint8_t *to, const char *text, uint32_t room)
{
    uint32_t length = (uint32_t)strlen(text);
    if (length > room) {
        length = room;
    }
    (void)memset(to, 0, room);
    (void)memcpy(to, text, length);
}

static void put_identity(struct shoal_frame *reply)
{
    uint8_t *to = reply->content;
    const uint32_t resets = shoal_port_resets();
    to[SHOAL_IDENTITY_AT_VERSION] = SHOAL_FRAME_VERSION;
    to[SHOAL_IDENTITY_AT_PIECES] = shoal_image.n_pieces;
    to[SHOAL_IDENTITY_AT_SLOT] = shoal_slot_running();
    to[SHOAL_IDENTITY_AT_TRIAL] = shoal_slot_trial();
    shoal_bytes_put32(&to[SHOAL_IDENTITY_AT_PLAN], shoal_image.plan);
    shoal_bytes_put32(&to[SHOAL_IDENTITY_AT_BUILD], shoal_image.build);
    shoal_bytes_put32(&to[SHOAL_IDENTITY_AT_IMAGE_VERSION], shoal_image.version);
    shoal_bytes_put32(&to[SHOAL_IDENTITY_AT_FLASH_BYTES], shoal_image.flash_bytes);
    shoal_bytes_put32(&to[SHOAL_IDENTITY_AT_RAM_BYTES], shoal_image.ram_bytes);
    shoal_bytes_put32(&to[SHOAL_IDENTITY_AT_TICK_HZ], shoal_port_tick_hz());
    shoal_bytes_put16(&to[SHOAL_IDENTITY_AT_RECEIVE_BYTES], SHOAL_RING_BYTES);
    shoal_bytes_put16(&to[SHOAL_IDENTITY_AT_RESETS], (resets > 0xFFFFU) ? 0xFFFFU : resets);
    copy_text(&to[SHOAL_IDENTITY_AT_BOARD], shoal_image.board, SHOAL_FRAME_BOARD_BYTES);
    reply->length = SHOAL_IDENTITY_BYTES;
}

static uint8_t on_piece(const struct shoal_frame *command, struct shoal_frame *reply)
{
    if (command->length != SHOAL_PIECE_INDEX_BYTES) {
        return SHOAL_STATUS_BAD_CONTENT;
    }
    if (command->content[0] >= shoal_image.n_pieces) {
        return SHOAL_STATUS_NO_SUCH_PIECE;
    }
    const struct shoal_image_piece *entry = &shoal_image.pieces[command->content[0]];
    const struct shoal_piece *piece = entry->piece;
    uint8_t *to = reply->content;
    shoal_bytes_put32(&to[SHOAL_PIECE_AT_INPUT_BYTES], piece->input_bytes);
    shoal_bytes_put32(&to[SHOAL_PIECE_AT_OUTPUT_BYTES], piece->output_bytes);
    shoal_bytes_put32(&to[SHOAL_PIECE_AT_ARENA_BYTES], piece->arena_bytes);
    shoal_bytes_put_float(&to[SHOAL_PIECE_AT_INPUT_SCALE], piece->input_scale);
    shoal_bytes_put32(&to[SHOAL_PIECE_AT_INPUT_ZERO_POINT], (uint32_t)piece->input_zero_point);
    shoal_bytes_put_float(&to[SHOAL_PIECE_AT_OUTPUT_SCALE], piece->output_scale);
    shoal_bytes_put32(&to[SHOAL_PIECE_AT_OUTPUT_ZERO_POINT], (uint32_t)piece->output_zero_point);
    (void)memcpy(&to[SHOAL_PIECE_AT_SHA256], entry->sha256, SHOAL_FRAME_SHA256_BYTES);
    copy_text(&to[SHOAL_PIECE_AT_NAME], piece->name, SHOAL_FRAME_NAME_BYTES);
    reply->length = SHOAL_PIECE_BYTES;
    return SHOAL_STATUS_OK;
}

static uint8_t on_input(struct shoal_agent *agent)
{
    const struct shoal_frame *command = &agent->command;
    if (command->length < SHOAL_INPUT_HEAD_BYTES) {
        return SHOAL_STATUS_BAD_CONTENT;
    }
    const uint8_t index = command->content[SHOAL_INPUT_HEAD_AT_PIECE];
    const uint32_t chunk = shoal_bytes_get16(&command->content[SHOAL_INPUT_HEAD_AT_CHUNK]);
    const uint32_t request = shoal_bytes_get32(&command->content[SHOAL_INPUT_HEAD_AT_REQUEST]);
    if (index >= shoal_image.n_pieces) {
        return SHOAL_STATUS_NO_SUCH_PIECE;
    }
    const uint32_t total = shoal_image.pieces[index].piece->input_bytes;
    const uint32_t offset = chunk * SHOAL_FRAME_CHUNK_BYTES;
    if ((chunk >= SHOAL_FRAME_MAX_CHUNKS) || (offset >= total)) {
        return SHOAL_STATUS_BAD_CONTENT;
    }
    const uint32_t left = total - offset;
    const uint32_t expected = (left < SHOAL_FRAME_CHUNK_BYTES) ? left : SHOAL_FRAME_CHUNK_BYTES;
    if ((uint32_t)command->length != (SHOAL_INPUT_HEAD_BYTES + expected)) {
        return SHOAL_STATUS_BAD_CONTENT;
    }
    if (!agent->has_input || (agent->input_request != request) || (agent->input_piece != index)) {
        agent->has_input = true;
        agent->input_request = request;
        agent->input_piece = index;
        agent->n_chunks = 0U;
        (void)memset(agent->chunks, 0, sizeof agent->chunks);
    }
    const uint8_t bit = (uint8_t)(1U << (chunk % 8U));
    if ((agent->chunks[chunk / 8U] & bit) == 0U) {
        agent->chunks[chunk / 8U] |= bit;
        agent->n_chunks++;
        (void)memcpy(&shoal_image.input[offset], &command->content[SHOAL_INPUT_HEAD_BYTES],
                     expected);
    }
    return SHOAL_STATUS_OK;
}

/* The result is kept: a repeated INFER is answered from it. */
static uint8_t infer(struct shoal_agent *agent, uint8_t index, uint32_t request, uint32_t crc)
{
    const struct shoal_piece *piece = shoal_image.pieces[index].piece;
    const uint32_t chunks =
        (piece->input_bytes + SHOAL_FRAME_CHUNK_BYTES - 1U) / SHOAL_FRAME_CHUNK_BYTES;
    const bool this_input =
        agent->has_input && (agent->input_request == request) && (agent->input_piece == index);
    if (!this_input || (agent->n_chunks != chunks)) {
        return SHOAL_STATUS_NOT_ALL_INPUT;
    }
    if (shoal_crc32(0U, (const uint8_t *)shoal_image.input, piece->input_bytes) != crc) {
        agent->has_input = false;
        return SHOAL_STATUS_INPUT_DIFFERS;
    }
    agent->has_result = false;
    const uint64_t before = shoal_port_ticks();
    piece->run(shoal_image.input, shoal_image.output, shoal_image.arena);
    agent->result_ticks = shoal_port_ticks() - before;
    agent->result_crc =
        shoal_crc32(0U, (const uint8_t *)shoal_image.output, piece->output_bytes);
    agent->result_piece = index;
    agent->result_request = request;
    agent->result_input_crc = crc;
    agent->has_result = true;
    agent->inferences++;
    return SHOAL_STATUS_OK;
}

static uint8_t on_infer(struct shoal_agent *agent)
{
    const struct shoal_frame *command = &agent->command;
    struct shoal_frame *reply = &agent->reply;
    if (command->length != SHOAL_INFER_BYTES) {
        return SHOAL_STATUS_BAD_CONTENT;
    }
    const uint8_t index = command->content[SHOAL_INFER_AT_PIECE];
    const uint32_t request = shoal_bytes_get32(&command->content[SHOAL_INFER_AT_REQUEST]);
    const uint32_t crc = shoal_bytes_get32(&command->content[SHOAL_INFER_AT_INPUT_CRC]);
    if (index >= shoal_image.n_pieces) {
        return SHOAL_STATUS_NO_SUCH_PIECE;
    }
    if (!agent->has_result || (agent->result_request != request) ||
        (agent->result_piece != index) || (agent->result_input_crc != crc)) {
        const uint8_t status = infer(agent, index, request, crc);
        if (status != SHOAL_STATUS_OK) {
            return status;
        }
    }
    const uint32_t total = shoal_image.pieces[index].piece->output_bytes;
    const uint32_t part =
        (total < SHOAL_FRAME_INLINE_OUTPUT_BYTES) ? total : SHOAL_FRAME_INLINE_OUTPUT_BYTES;
    uint8_t *to = reply->content;
    shoal_bytes_put32(&to[SHOAL_RESULT_HEAD_AT_REQUEST], request);
    shoal_bytes_put64(&to[SHOAL_RESULT_HEAD_AT_TICKS], agent->result_ticks);
    shoal_bytes_put32(&to[SHOAL_RESULT_HEAD_AT_OUTPUT_BYTES], total);
    shoal_bytes_put32(&to[SHOAL_RESULT_HEAD_AT_OUTPUT_CRC], agent->result_crc);
    (void)memcpy(&to[SHOAL_RESULT_HEAD_BYTES], shoal_image.output, part);
    reply->length = (uint16_t)(SHOAL_RESULT_HEAD_BYTES + part);
    return SHOAL_STATUS_OK;
}

static uint8_t on_read(struct shoal_agent *agent)
{
    const struct shoal_frame *command = &agent->command;
    if (command->length != SHOAL_READ_BYTES) {
        return SHOAL_STATUS_BAD_CONTENT;
    }
    const uint32_t request = shoal_bytes_get32(&command->content[SHOAL_READ_AT_REQUEST]);
    const uint32_t offset = shoal_bytes_get32(&command->content[SHOAL_READ_AT_OFFSET]);
    const uint32_t length = shoal_bytes_get16(&command->content[SHOAL_READ_AT_LENGTH]);
    if (!agent->has_result || (agent->result_request != request)) {
        return SHOAL_STATUS_NO_SUCH_RESULT;
    }
    const uint32_t total = shoal_image.pieces[agent->result_piece].piece->output_bytes;
    if ((length > SHOAL_FRAME_MAX_CONTENT_BYTES) || (offset > total) ||
        (length > (total - offset))) {
        return SHOAL_STATUS_BAD_CONTENT;
    }
    (void)memcpy(agent->reply.content, &shoal_image.output[offset], length);
    agent->reply.length = (uint16_t)length;
    return SHOAL_STATUS_OK;
}

/* Values of the last output as bits, the first the highest of its byte. */
static uint8_t on_bits(struct shoal_agent *agent)
{
    const struct shoal_frame *command = &agent->command;
    if (command->length != SHOAL_BITS_BYTES) {
        return SHOAL_STATUS_BAD_CONTENT;
    }
    const uint32_t request = shoal_bytes_get32(&command->content[SHOAL_BITS_AT_REQUEST]);
    const uint32_t offset = shoal_bytes_get32(&command->content[SHOAL_BITS_AT_OFFSET]);
    const uint32_t count = shoal_bytes_get16(&command->content[SHOAL_BITS_AT_LENGTH]);
    const int32_t above = (int8_t)command->content[SHOAL_BITS_AT_ABOVE];
    if (!agent->has_result || (agent->result_request != request)) {
        return SHOAL_STATUS_NO_SUCH_RESULT;
    }
    const uint32_t total = shoal_image.pieces[agent->result_piece].piece->output_bytes;
    if ((count > (8U * SHOAL_FRAME_MAX_CONTENT_BYTES)) || (offset > total) ||
        (count > (total - offset))) {
        return SHOAL_STATUS_BAD_CONTENT;
    }
    uint8_t *to = agent->reply.content;
    const uint32_t length = (count + 7U) / 8U;
    (void)memset(to, 0, length);
    for (uint32_t i = 0U; i < count; i++) {
        if (shoal_image.output[offset + i] > above) {
            to[i / 8U] |= (uint8_t)(0x80U >> (i % 8U));
        }
    }
    agent->reply.length = (uint16_t)length;
    return SHOAL_STATUS_OK;
}

static uint8_t on_answer(struct shoal_agent *agent)
{
    const struct shoal_frame *command = &agent->command;
    if (command->length != SHOAL_ANSWER_BYTES) {
        return SHOAL_STATUS_BAD_CONTENT;
    }
    const uint32_t request = shoal_bytes_get32(command->content);
    if (!agent->has_result || (agent->result_request != request)) {
        return SHOAL_STATUS_NO_SUCH_RESULT;
    }
    struct shoal_image_answer answer;
    if (!shoal_image_answer(agent->result_piece, shoal_image.output, &answer)) {
        return SHOAL_STATUS_NO_ANSWER;
    }
    uint8_t *to = agent->reply.content;
    (void)memset(to, 0, SHOAL_ANSWER_INFO_BYTES);
    shoal_bytes_put32(&to[SHOAL_ANSWER_INFO_AT_REQUEST], request);
    shoal_bytes_put16(&to[SHOAL_ANSWER_INFO_AT_CLASS_INDEX], answer.class_index);
    to[SHOAL_ANSWER_INFO_AT_KNOWN] = answer.known ? 1U : 0U;
    shoal_bytes_put32(&to[SHOAL_ANSWER_INFO_AT_ENTROPY], answer.entropy);
    shoal_bytes_put32(&to[SHOAL_ANSWER_INFO_AT_CONFIDENCE], answer.confidence);
    agent->reply.length = SHOAL_ANSWER_INFO_BYTES;
    return SHOAL_STATUS_OK;
}

static void put_statistics(const struct shoal_agent *agent, struct shoal_frame *reply)
{
    uint8_t *to = reply->content;
    shoal_bytes_put32(&to[SHOAL_STATISTICS_AT_INFERENCES], agent->inferences);
    shoal_bytes_put64(&to[SHOAL_STATISTICS_AT_LAST_TICKS], agent->result_ticks);
    shoal_bytes_put32(&to[SHOAL_STATISTICS_AT_STACK_BYTES], shoal_port_stack_bytes());
    shoal_bytes_put32(&to[SHOAL_STATISTICS_AT_STACK_USED_BYTES], shoal_port_stack_used_bytes());
    shoal_bytes_put32(&to[SHOAL_STATISTICS_AT_DAMAGED], agent->damaged);
    shoal_bytes_put32(&to[SHOAL_STATISTICS_AT_OVERRUNS], shoal_port_overruns);
    shoal_bytes_put32(&to[SHOAL_STATISTICS_AT_REFUSED], agent->refused);
    reply->length = SHOAL_STATISTICS_BYTES;
}

/* Whether a REBOOT may be done; what is to be started then is settled. A command for the slot that
 * runs came twice: all is done. */
static uint8_t on_reboot(const struct shoal_frame *command, bool *reboot)
{
    uint8_t to = 0U;
    if ((command->length != SHOAL_REBOOT_BYTES) ||
        (shoal_bytes_get32(&command->content[SHOAL_REBOOT_AT_KEY]) != SHOAL_FRAME_REBOOT_KEY) ||
        (command->content[SHOAL_REBOOT_AT_TO] > SHOAL_REBOOT_TO_SLOT_1)) {
        return SHOAL_STATUS_BAD_CONTENT;
    }
    to = command->content[SHOAL_REBOOT_AT_TO];
    if (to >= SHOAL_REBOOT_TO_SLOT_0) {
        if ((to - SHOAL_REBOOT_TO_SLOT_0) == shoal_slot_running()) {
            return SHOAL_STATUS_OK;
        }
        if (!shoal_slot_roll_back()) {
            return SHOAL_STATUS_REFUSED;
        }
    }
    *reboot = true;
    return SHOAL_STATUS_OK;
}

static void drain(void)
{
    while (shoal_ring_used(&shoal_port_to_send) > 0U) {
        shoal_port_send();
    }
}

static void handle(struct shoal_agent *agent)
{
    const struct shoal_frame *command = &agent->command;
    struct shoal_frame *reply = &agent->reply;
    uint8_t status = SHOAL_STATUS_OK;
    bool reboot = false;
    reply->length = 0U;
    switch (command->kind) {
    case SHOAL_KIND_IDENTITY:
        /* Somebody talks to us over a line that works: the image may stay. */
        shoal_slot_confirm();
        put_identity(reply);
        break;
    case SHOAL_KIND_PIECE:
        status = on_piece(command, reply);
        break;
    case SHOAL_KIND_INPUT:
        status = on_input(agent);
        break;
    case SHOAL_KIND_INFER:
        status = on_infer(agent);
        break;
    case SHOAL_KIND_READ:
        status = on_read(agent);
        break;
    case SHOAL_KIND_STATISTICS:
        put_statistics(agent, reply);
        break;
    case SHOAL_KIND_REBOOT:
        status = on_reboot(command, &reboot);
        break;
    case SHOAL_KIND_ANSWER:
        status = on_answer(agent);
        break;
    case SHOAL_KIND_BITS:
        status = on_bits(agent);
        break;
    default:
        status = SHOAL_STATUS_UNKNOWN_COMMAND;
        break;
    }
    if (status != SHOAL_STATUS_OK) {
        agent->refused++;
    }
    reply->kind = (uint8_t)(command->kind | SHOAL_REPLY);
    reply->status = status;
    reply->sequence = command->sequence;
    send(agent);
    if (reboot) {
        drain();
        shoal_port_reset(command->content[SHOAL_REBOOT_AT_TO] == SHOAL_REBOOT_TO_BOOTLOADER);
    }
}

static void tell(struct shoal_agent *agent, uint8_t kind)
{
    agent->reply.kind = kind;
    agent->reply.status = SHOAL_STATUS_OK;
    agent->reply.sequence = 0U;
    send(agent);
}

void shoal_agent_begin(struct shoal_agent *agent)
{
    put_identity(&agent->reply);
    tell(agent, SHOAL_KIND_READY);
}

bool shoal_agent_poll(struct shoal_agent *agent)
{
    bool busy = false;
    uint8_t byte = 0U;
    while (shoal_ring_take(&shoal_port_received, &byte)) {
        busy = true;
        switch (shoal_frame_take(&agent->reader, byte, &agent->command)) {
        case SHOAL_FRAME_WHOLE:
            handle(agent);
            break;
        case SHOAL_FRAME_DAMAGED:
            agent->damaged++;
            agent->reply.length = 0U;
            tell(agent, SHOAL_KIND_DAMAGED);
            break;
        default:
            break;
        }
    }
    return busy;
}
