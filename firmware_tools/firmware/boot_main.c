/* The bootloader: starts an image, or listens for a new one. */
#include "boot_an3155.h"
#include "boot_state.h"
#include "shoal_board.h"
#include "shoal_handover.h"
#include "shoal_port.h"
#include "shoal_register.h"

#define SYST_CSR SHOAL_REGISTER(0xE000E010U)
#define SYST_CSR_WRAPPED (1U << 16) /* cleared by reading */
#define VTOR SHOAL_REGISTER(0xE000ED08U)

bool shoal_boot_get(uint8_t *byte)
{
    uint32_t wraps = (shoal_port_tick_hz() >> 24) + 1U; /* of a counter of 24 bits */
    while (!shoal_ring_take(&shoal_port_received, byte)) {
        shoal_port_alive();
        shoal_port_send(); /* receives too: the UART has no interrupt here */
        if ((SYST_CSR & SYST_CSR_WRAPPED) != 0U) {
            wraps--;
        }
        if (wraps == 0U) {
            return false;
        }
    }
    return true;
}

void shoal_boot_put(uint8_t byte)
{
    while (!shoal_ring_put(&shoal_port_to_send, byte)) {
        shoal_port_send();
    }
    shoal_port_send();
}

/* Leave everything as after a reset, but for the watchdog, and go. */
static void start(uint8_t slot)
{
    const uint32_t vectors = shoal_boot_slot_address(slot) + SHOAL_BOOT_HEADER_BYTES;
    const uint32_t stack = SHOAL_REGISTER(vectors);
    const uint32_t entry = SHOAL_REGISTER(vectors + 4U);
    __asm volatile("cpsid i" ::: "memory");
    SYST_CSR = 0U;
    VTOR = vectors;
    __asm volatile("msr msp, %0\n\tdsb\n\tisb\n\tbx %1" ::"r"(stack), "r"(entry) : "memory");
}

int main(void)
{
    const bool stay = shoal_handover.stay == SHOAL_HANDOVER_STAY;
    shoal_handover.stay = 0U;
    const struct shoal_boot_choice choice = shoal_boot_choose();
    if ((choice.slot != SHOAL_BOOT_NO_SLOT) && !stay) {
        /* Before it runs: an image that hangs must not be tried again. */
        if ((choice.why != SHOAL_BOOT_TRIAL) ||
            shoal_boot_record(SHOAL_BOOT_TRIED, choice.slot)) {
            shoal_handover.slot = choice.slot;
            shoal_handover.trial = choice.why;
            shoal_handover.asked = 1U;
            start(choice.slot);
        }
    }
    while (!shoal_boot_serve()) {
        shoal_port_alive();
    }
    while (shoal_ring_used(&shoal_port_to_send) > 0U) {
        shoal_port_send();
    }
    shoal_port_reset(false);
    return 0;
}
