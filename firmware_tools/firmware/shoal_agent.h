/* The agent loop: takes commands from the line, runs pieces, replies. */
#ifndef SHOAL_AGENT_H
#define SHOAL_AGENT_H

#include "shoal_frame.h"

#include <stdbool.h>
#include <stdint.h>

/** All that the loop remembers. Begin with all zero. */
struct shoal_agent {
    struct shoal_frame_reader reader;
    struct shoal_frame command;
    struct shoal_frame reply;
    uint8_t line[SHOAL_FRAME_MAX_FRAME_BYTES];

    bool has_input; /* the input of input_request is on its way, or there */
    uint8_t input_piece;
    uint32_t input_request;
    uint32_t n_chunks;
    uint8_t chunks[(SHOAL_FRAME_MAX_CHUNKS + 7U) / 8U]; /* one bit for each that came */

    bool has_result; /* output holds the result of result_request */
    uint8_t result_piece;
    uint32_t result_request;
    uint32_t result_input_crc;
    uint32_t result_crc;
    uint64_t result_ticks;

    uint32_t inferences;
    uint32_t damaged;
    uint32_t refused;
};

/** Tell the line that the device is there: after every reset. */
void shoal_agent_begin(struct shoal_agent *agent);

/** Handle all that has come. Returns whether anything had. */
bool shoal_agent_poll(struct shoal_agent *agent);

#endif
