// SPDX-License-Identifier: Apache-2.0
// The list of instruction sets: order, names, forcing, refusing.
#include "check.h"

int main() {
  const char* names[] = {"scalar", "avx2", "avx512", "avx512_bitalg", "avx512_amx"};
  CHECK(bop2nd_isa_count() == 5, "%d entries", bop2nd_isa_count());
  int best = 0;
  for (int id = 0; id < 5; ++id) {
    CHECK(std::string(bop2nd_isa_name(id)) == names[id], "%s", bop2nd_isa_name(id));
    CHECK(bop2nd_isa_requires(id) && *bop2nd_isa_requires(id), "%d needs nothing", id);
    bool supported = bop2nd_isa_supported(id) == 1;
    CHECK(supported == (bop2nd::table_of(id) != nullptr), "%s", names[id]);
    CHECK((bop2nd_isa_force(id) == 0) == supported, "%s", names[id]);
    CHECK(!supported || bop2nd_isa_active() == id, "%s", names[id]);
    if (supported) best = id;
  }
  CHECK(bop2nd_isa_supported(0) == 1, "scalar runs anywhere");
  for (int id : {-2, 5, 99}) {
    CHECK(bop2nd_isa_force(id) == -1, "%d", id);
    CHECK(!bop2nd_isa_name(id) && !bop2nd_isa_supported(id) && bop2nd_isa_calls(id) == 0, "%d", id);
  }
  CHECK(bop2nd_isa_force(-1) == 0 && bop2nd_isa_active() == best, "best is %d", best);
  for (int id = 0; id < 5; ++id) {
    const bop2nd::KernelTable* table = bop2nd::table_of(id);
    if (table) CHECK(table->register_loop(2) > 0, "%s", names[id]);
  }
}
