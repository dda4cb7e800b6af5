/* Memory-mapped registers. */
#ifndef SHOAL_REGISTER_H
#define SHOAL_REGISTER_H

#include <stdint.h>

/* MISRA C:2012 rule 11.4 deviation: a register is at a number. A test has its own registers. */
#ifndef SHOAL_REGISTER
#define SHOAL_REGISTER(address) (*(volatile uint32_t *)(uintptr_t)(address))
#endif

#endif
