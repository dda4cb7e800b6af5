/* What a piece's scores say, in fixed point: its class, normalized entropy, or don't know. The same
 * definitions as agent/protocol/scores.py, which thresholds are calibrated with. */
#ifndef SHOAL_SCORES_H
#define SHOAL_SCORES_H

#include <stdint.h>

#define SHOAL_SCORES_ONE 0x1000000U /* 1.0 in Q24 */

/**
 * How a piece's scores are read; generated from its answer rule.
 *
 * exponentials: exp(-d * scale) in Q31 of d = 0 .. 255 steps below the highest score.
 * outcome_of:   of each row, its outcome: 0 .. classes - 1, or `classes` for the rest.
 * rows:         scores of the piece, 1 .. 255.
 * classes:      that it answers, 1 .. rows.
 * outcomes:     classes, and one more where there is a rest; at least 2.
 * inverse_log:  1 / log2(outcomes) in Q24.
 * dont_know:    largest normalized entropy at which it still knows, Q24.
 */
struct shoal_scores {
    const uint32_t *exponentials;
    const uint8_t *outcome_of;
    uint16_t rows, classes, outcomes;
    uint32_t inverse_log;
    uint32_t dont_know;
};

/**
 * An answer: position among the piece's classes; normalized entropy and probability of the class
 * in Q24, 0 .. SHOAL_SCORES_ONE; whether it knows. The entropy is what was computed also where it
 * does not know.
 */
struct shoal_answer {
    uint32_t class_position;
    uint32_t entropy;
    uint32_t confidence;
    uint32_t known;
};

/** Reads `rows` int8 scores. */
struct shoal_answer shoal_scores_answer(const struct shoal_scores *rule, const int8_t *scores);

/** Whether an exit may answer: entropy at or below its threshold, both Q24. */
static inline uint32_t shoal_scores_exits(uint32_t entropy, uint32_t threshold)
{
    return entropy <= threshold ? 1U : 0U;
}

#endif
