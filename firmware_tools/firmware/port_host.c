/*
 * The same loop as a process of this machine: over stdin and stdout, or with --pty over a pseudo
 * terminal whose name is its first line of output.
 */
#define _XOPEN_SOURCE 600

#include "shoal_agent.h"
#include "shoal_image.h"
#include "shoal_port.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

struct shoal_ring shoal_port_received;
struct shoal_ring shoal_port_to_send;
volatile uint32_t shoal_port_overruns;

static struct shoal_agent agent;
static int input_fd = STDIN_FILENO;
static int output_fd = STDOUT_FILENO;
static bool reset_wanted;
static uint32_t resets;

void shoal_port_send(void)
{
    uint8_t bytes[SHOAL_RING_BYTES];
    size_t length = 0U;
    while ((length < sizeof bytes) && shoal_ring_take(&shoal_port_to_send, &bytes[length])) {
        length++;
    }
    size_t sent = 0U;
    while (sent < length) {
        const ssize_t n = write(output_fd, &bytes[sent], length - sent);
        if (n > 0) {
            sent += (size_t)n;
        } else if (errno != EINTR) {
            exit(0); /* nobody listens any more */
        } else {
            /* again */
        }
    }
}

void shoal_port_wait(void)
{
    uint8_t bytes[SHOAL_RING_BYTES];
    const uint32_t room = SHOAL_RING_BYTES - shoal_ring_used(&shoal_port_received);
    const ssize_t n = read(input_fd, bytes, room);
    if (n == 0 || ((n < 0) && (errno != EINTR))) {
        exit(0); /* the line is gone */
    }
    for (ssize_t i = 0; i < n; i++) {
        if (!shoal_ring_put(&shoal_port_received, bytes[i])) {
            shoal_port_overruns++;
        }
    }
}

void shoal_port_alive(void)
{
}

uint64_t shoal_port_ticks(void)
{
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now) != 0) {
        return 0U;
    }
    return ((uint64_t)now.tv_sec * 1000000000U) + (uint64_t)now.tv_nsec;
}

uint32_t shoal_port_tick_hz(void)
{
    return 1000000000U;
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
    return resets;
}

void shoal_port_reset(bool to_bootloader)
{
    (void)to_bootloader;
    reset_wanted = true;
}

static bool open_pty(void)
{
    const int master = posix_openpt(O_RDWR | O_NOCTTY);
    if ((master < 0) || (grantpt(master) != 0) || (unlockpt(master) != 0)) {
        return false;
    }
    const char *name = ptsname(master);
    /* We keep its other end open, or reading fails whenever nobody else has it open. */
    const int slave = (name == NULL) ? -1 : open(name, O_RDWR | O_NOCTTY);
    struct termios raw;
    if ((slave < 0) || (tcgetattr(slave, &raw) != 0)) {
        return false;
    }
    raw.c_iflag = 0U;
    raw.c_oflag = 0U;
    raw.c_lflag = 0U;
    raw.c_cflag = CS8 | CREAD | CLOCAL;
    raw.c_cc[VMIN] = 1U;
    raw.c_cc[VTIME] = 0U;
    if (tcsetattr(slave, TCSANOW, &raw) != 0) {
        return false;
    }
    if ((printf("%s\n", name) < 0) || (fflush(stdout) != 0)) {
        return false;
    }
    input_fd = master;
    output_fd = master;
    return true;
}

int main(int argc, char **argv)
{
    if ((argc > 1) && (strcmp(argv[1], "--pty") == 0) && !open_pty()) {
        perror("pty");
        return 1;
    }
    for (;;) {
        (void)memset(&agent, 0, sizeof agent);
        shoal_agent_begin(&agent);
        while (!reset_wanted) {
            if (!shoal_agent_poll(&agent)) {
                shoal_port_wait();
            }
        }
        reset_wanted = false;
        resets++;
    }
}
