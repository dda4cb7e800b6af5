#include "shoal_scores.h"

#define FRACTION_BITS 24U

/* log2(value) in Q24, value >= 1: the whole part by shifting, each bit of the rest by squaring. */
static uint32_t log2_of(uint64_t value)
{
    uint32_t whole = 0U;
    uint64_t x = value;
    while (x >= (1ULL << 32)) {
        x >>= 1;
        whole++;
    }
    while (x < (1ULL << 31)) {
        x <<= 1;
        whole--; /* wraps, and comes back with the 31 below */
    }
    uint32_t result = (whole + 31U) << FRACTION_BITS;
    for (uint32_t bit = 1U << (FRACTION_BITS - 1U); bit != 0U; bit >>= 1) {
        x = (x * x) >> 31;
        if (x >= (1ULL << 32)) {
            x >>= 1;
            result |= bit;
        }
    }
    return result;
}

/* Sum of the exponentials of an outcome's rows, Q31; every row's for outcome == outcomes. */
static uint64_t mass_of(const struct shoal_scores *rule, const int8_t *scores, int32_t highest,
                        uint32_t outcome)
{
    uint64_t mass = 0U;
    for (uint32_t row = 0U; row < rule->rows; row++) {
        if ((outcome == rule->outcomes) || (rule->outcome_of[row] == outcome)) {
            mass += rule->exponentials[(uint32_t)(highest - scores[row])];
        }
    }
    return mass;
}

/* The class of the highest score among the piece's own rows, of equals the first: told by scores,
 * since masses far below the rest's may both have become 0. */
static uint32_t likeliest(const struct shoal_scores *rule, const int8_t *scores)
{
    uint32_t position = rule->classes;
    int32_t highest = -129;
    for (uint32_t row = 0U; row < rule->rows; row++) {
        const uint32_t outcome = rule->outcome_of[row];
        if ((outcome < rule->classes) &&
            ((scores[row] > highest) || ((scores[row] == highest) && (outcome < position)))) {
            highest = scores[row];
            position = outcome;
        }
    }
    return position;
}

struct shoal_answer shoal_scores_answer(const struct shoal_scores *rule, const int8_t *scores)
{
    int32_t highest = scores[0];
    for (uint32_t row = 1U; row < rule->rows; row++) {
        highest = scores[row] > highest ? scores[row] : highest;
    }
    const uint64_t total = mass_of(rule, scores, highest, rule->outcomes);
    const uint32_t log_total = log2_of(total);
    struct shoal_answer answer = {likeliest(rule, scores), 0U, 0U, 0U};
    uint64_t best = 0U;
    uint64_t rest = 0U;
    uint64_t entropy = 0U; /* bits, Q24 */
    for (uint32_t outcome = 0U; outcome < rule->outcomes; outcome++) {
        const uint64_t mass = mass_of(rule, scores, highest, outcome);
        if (outcome >= rule->classes) {
            rest = mass;
        } else {
            best = mass > best ? mass : best;
        }
        if (mass != 0U) {
            const uint64_t share = ((mass << FRACTION_BITS) + total / 2U) / total;
            entropy += (share * (log_total - log2_of(mass))) >> FRACTION_BITS;
        }
    }
    entropy = (entropy * rule->inverse_log) >> FRACTION_BITS;
    answer.entropy = entropy < SHOAL_SCORES_ONE ? (uint32_t)entropy : SHOAL_SCORES_ONE;
    answer.confidence = (uint32_t)(((best << FRACTION_BITS) + total / 2U) / total);
    answer.known = ((rest <= best) && (shoal_scores_exits(answer.entropy, rule->dont_know) != 0U))
                       ? 1U
                       : 0U;
    return answer;
}
