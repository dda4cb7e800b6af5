/*
 * A coverage-guided fuzzer for compilers without libFuzzer: fuzz_driver SECONDS SEED [INPUT]
 *
 * Inputs that reach an edge of the target, or reach it more often than any before, are kept and
 * mutated on. Edges are told by gcc's -fsanitize-coverage=trace-pc. With INPUT, only that file is
 * run. What it did is its last line of output; an input that fails is left in finding.bin.
 */
#define _POSIX_C_SOURCE 200809L

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <signal.h>

#define MAP_SIZE 65536U
#define MOST_KEPT 8192U
#define MOST_BYTES 2048U
#define FIRST_BYTES 64U

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
void __sanitizer_cov_trace_pc(void);
void __sanitizer_set_death_callback(void (*callback)(void));

static uint8_t hits[MAP_SIZE];
static uint8_t most[MAP_SIZE];
static uint16_t touched[MAP_SIZE];
static uint32_t n_touched;
static uintptr_t previous;

static struct {
    uint8_t *bytes;
    size_t size;
} kept[MOST_KEPT];
static uint32_t n_kept;

static uint8_t input[MOST_BYTES];
static size_t input_size;
static uint64_t noise;

void __sanitizer_cov_trace_pc(void)
{
    /* From a place in the program: where it is loaded to is chance. */
    const uintptr_t here =
        (uintptr_t)__builtin_return_address(0) - (uintptr_t)&LLVMFuzzerTestOneInput;
    const uint16_t edge = (uint16_t)((here ^ (here >> 13) ^ (previous << 3)) % MAP_SIZE);
    previous = here;
    if (hits[edge] == 0U) {
        touched[n_touched] = edge;
        n_touched++;
    }
    if (hits[edge] < 255U) {
        hits[edge]++;
    }
}

static uint32_t below(uint32_t limit)
{
    noise ^= noise << 13;
    noise ^= noise >> 7;
    noise ^= noise << 17;
    return (uint32_t)((noise >> 16) % limit);
}

static uint8_t bucket(uint8_t count)
{
    uint8_t size = 1U;
    while ((count >>= 1) != 0U) {
        size++;
    }
    return size;
}

static void leave_finding(void)
{
    FILE *file = fopen("finding.bin", "wb");
    if (file != NULL) {
        (void)fwrite(input, 1U, input_size, file);
        (void)fclose(file);
    }
}

static void on_abort(int signal_number)
{
    leave_finding();
    _Exit(128 + signal_number);
}

/* Returns whether the input showed anything new. */
static int run(void)
{
    for (uint32_t i = 0U; i < n_touched; i++) {
        hits[touched[i]] = 0U;
    }
    n_touched = 0U;
    previous = 0U;
    (void)LLVMFuzzerTestOneInput(input, input_size);
    int is_new = 0;
    for (uint32_t i = 0U; i < n_touched; i++) {
        const uint8_t size = bucket(hits[touched[i]]);
        if (size > most[touched[i]]) {
            most[touched[i]] = size;
            is_new = 1;
        }
    }
    return is_new;
}

static void keep(void)
{
    if (n_kept == MOST_KEPT) {
        return;
    }
    kept[n_kept].bytes = malloc(input_size + 1U);
    if (kept[n_kept].bytes == NULL) {
        return;
    }
    (void)memcpy(kept[n_kept].bytes, input, input_size);
    kept[n_kept].size = input_size;
    n_kept++;
}

static void insert(size_t at, const uint8_t *bytes, size_t length)
{
    const size_t room = MOST_BYTES - input_size;
    const size_t n = (length < room) ? length : room;
    (void)memmove(&input[at + n], &input[at], input_size - at);
    (void)memcpy(&input[at], bytes, n);
    input_size += n;
}

static void mutate(void)
{
    static const uint8_t edges[] = {0U, 1U, 2U, 4U, 8U, 63U, 64U, 127U, 128U, 129U, 224U, 254U, 255U};
    const size_t at = (input_size > 0U) ? below((uint32_t)input_size) : 0U;
    uint8_t some[FIRST_BYTES];
    switch ((input_size > 0U) ? below(8U) : 5U) {
    case 0U:
        input[at] ^= (uint8_t)(1U << below(8U));
        break;
    case 1U:
        input[at] = (uint8_t)below(256U);
        break;
    case 2U:
        input[at] = edges[below(sizeof edges)];
        break;
    case 3U: {
        const size_t n = 1U + below((uint32_t)(input_size - at));
        (void)memmove(&input[at], &input[at + n], input_size - at - n);
        input_size -= n;
        break;
    }
    case 4U: {
        const size_t left = input_size - at;
        const size_t n = 1U + below((uint32_t)((left < FIRST_BYTES) ? left : FIRST_BYTES));
        (void)memcpy(some, &input[at], n);
        insert(below((uint32_t)input_size + 1U), some, n);
        break;
    }
    case 5U: {
        const size_t n = 1U + below(FIRST_BYTES);
        for (size_t i = 0U; i < n; i++) {
            some[i] = (below(4U) == 0U) ? (uint8_t)below(256U) : edges[below(sizeof edges)];
        }
        insert(at, some, n);
        break;
    }
    case 6U:
        input[at] = (uint8_t)(input[at] + below(9U) - 4U);
        break;
    default:
        if (n_kept > 0U) {
            const uint32_t other = below(n_kept);
            if (kept[other].size > 0U) {
                const size_t from = below((uint32_t)kept[other].size);
                insert(at, &kept[other].bytes[from], kept[other].size - from);
            }
        }
        break;
    }
}

static double now_s(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + ((double)now.tv_nsec / 1e9);
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        return 2;
    }
    const double seconds = strtod(argv[1], NULL);
    noise = 0x9E3779B97F4A7C15U ^ strtoull(argv[2], NULL, 10);
    __sanitizer_set_death_callback(leave_finding);
    (void)signal(SIGABRT, on_abort);
    if (argc > 3) {
        FILE *file = fopen(argv[3], "rb");
        if (file == NULL) {
            return 2;
        }
        input_size = fread(input, 1U, sizeof input, file);
        (void)fclose(file);
        (void)run();
        return 0;
    }
    uint64_t runs = 0U;
    (void)run();
    keep();
    while (((runs % 256U) != 0U) || (now_s() < seconds)) {
        const uint32_t chosen = (below(3U) == 0U) ? (n_kept - 1U) : below(n_kept);
        input_size = kept[chosen].size;
        (void)memcpy(input, kept[chosen].bytes, input_size);
        const uint32_t times = 1U + below(6U);
        for (uint32_t i = 0U; i < times; i++) {
            mutate();
        }
        if (run() != 0) {
            keep();
        }
        runs++;
    }
    uint32_t reached = 0U;
    for (uint32_t i = 0U; i < MAP_SIZE; i++) {
        reached += (most[i] != 0U) ? 1U : 0U;
    }
    (void)printf("runs %llu kept %u edges %u cpu_s %.1f\n", (unsigned long long)runs, n_kept, reached,
                 now_s());
    for (uint32_t i = 0U; i < n_kept; i++) {
        free(kept[i].bytes);
    }
    return 0;
}
