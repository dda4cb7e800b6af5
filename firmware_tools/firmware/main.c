/* An image's loop. */
#include "shoal_agent.h"
#include "shoal_port.h"

static struct shoal_agent agent;

int main(void)
{
    shoal_agent_begin(&agent);
    for (;;) {
        if (!shoal_agent_poll(&agent)) {
            shoal_port_wait();
        }
        shoal_port_alive();
    }
}
