/*
 * A ring of bytes between one producer and one consumer, of which one may be an interrupt.
 *
 * Head and tail count on without end; their difference is what the ring holds. Each side writes
 * only its own counter.
 */
#ifndef SHOAL_RING_H
#define SHOAL_RING_H

#include <stdbool.h>
#include <stdint.h>

#define SHOAL_RING_BYTES 2048U /* a power of two */

struct shoal_ring {
    volatile uint32_t head; /* bytes ever put */
    volatile uint32_t tail; /* bytes ever taken */
    volatile uint8_t bytes[SHOAL_RING_BYTES];
};

static inline uint32_t shoal_ring_used(const struct shoal_ring *ring)
{
    const uint32_t tail = ring->tail;
    return ring->head - tail;
}

/** Put a byte; false, with nothing changed, where the ring is full. */
static inline bool shoal_ring_put(struct shoal_ring *ring, uint8_t byte)
{
    const uint32_t head = ring->head;
    if ((head - ring->tail) >= SHOAL_RING_BYTES) {
        return false;
    }
    ring->bytes[head % SHOAL_RING_BYTES] = byte;
    ring->head = head + 1U;
    return true;
}

/** Take the oldest byte; false where there is none. */
static inline bool shoal_ring_take(struct shoal_ring *ring, uint8_t *byte)
{
    const uint32_t tail = ring->tail;
    if (ring->head == tail) {
        return false;
    }
    *byte = ring->bytes[tail % SHOAL_RING_BYTES];
    ring->tail = tail + 1U;
    return true;
}

#endif
