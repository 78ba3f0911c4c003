// SPDX-License-Identifier: Apache-2.0
// Which instruction set serves the operators. Chosen once by what the CPU has; a caller can force one.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace bop2nd {

// The table in use; counts one operator call for it.
const KernelTable& active_table();
// What training needs besides; counts as active_table().
const TrainingTable& active_training();
// One entry, or null where this machine or build cannot run it.
const KernelTable* table_of(int id);
const TrainingTable* training_of(int id);
// The entry of that name, or -1.
int id_of(const char* name);
// Serves the operators with a table from outside (the tests' emulated instruction set), training excepted;
// null ends that.
void override_table(const KernelTable* table);

}  // namespace bop2nd

extern "C" {
int bop2nd_isa_count(void);
const char* bop2nd_isa_name(int id);  // null for an unknown id, also below
int bop2nd_isa_supported(int id);     // 1 if this CPU can run it
const char* bop2nd_isa_requires(int id);
int bop2nd_isa_active(void);
int bop2nd_isa_force(int id);      // -1: the best available; returns 0, or -1 if not supported
int64_t bop2nd_isa_calls(int id);  // operator calls served so far
}
