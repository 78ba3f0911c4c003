// SPDX-License-Identifier: Apache-2.0
// The list of instruction sets: order, complete tables, forcing, refusing.
#include "check.h"

extern "C" double bop2nd_register_loop(int id, int64_t iterations);

void check_complete(int id, const char* name) {
  const bop2nd::KernelTable& t = *bop2nd::table_of(id);
  CHECK(t.pack_rows && t.pack_columns && t.unpack_rows && t.pack_pixels && t.multiply,
        "a loop of %s is missing", name);
  const bop2nd::TrainingTable& training = *bop2nd::training_of(id);
  CHECK(training.step && training.apply_mask && training.depthwise_weights && training.depthwise_inputs,
        "a loop of the training of %s is missing", name);
  CHECK(t.sums && t.sums->lanes > 0, "%s has no sums", name);
  const bop2nd::SumTable& s = *t.sums;
  bool sums = s.signed_sums && s.add_sums && s.transpose_bits && s.transpose && s.load_reals && s.store_reals;
  CHECK(sums, "a loop of the sums of %s is missing", name);
  const bop2nd::SignedTable* products = t.signed_products;
  CHECK(products && products->look_up_reals && products->look_up_integers && products->multiply_bytes &&
            products->emit_reals && products->emit_integers && products->largest && products->quantize,
        "a loop of the signed products of %s is missing", name);
  const bop2nd::RealTable* reals = t.reals;
  CHECK(reals && reals->block > 0 && reals->multiply && reals->window_max && reals->window_sum &&
            reals->window_products && reals->binary && reals->affine && reals->clamp,
        "a loop of the real numbers of %s is missing", name);
  CHECK(!t.tiles || (t.tiles->pixels && t.tiles->multiply), "a loop of the tiles of %s is missing", name);
  CHECK(bop2nd_register_loop(id, 2) > 0, "a yardstick of %s is missing", name);
}

int main() {
  const int count = bop2nd_isa_count();
  CHECK(count > 0 && std::string(bop2nd_isa_name(0)) == "scalar", "%d entries", count);
  CHECK(bop2nd_isa_supported(0) == 1, "scalar runs anywhere");
  int best = 0;
  for (int id = 0; id < count; ++id) {
    const char* name = bop2nd_isa_name(id);
    CHECK(name && *name, "%d has no name", id);
    for (int other = 0; other < id; ++other)
      CHECK(std::string(bop2nd_isa_name(other)) != name, "%s stands twice", name);
    CHECK(bop2nd_isa_requires(id) && *bop2nd_isa_requires(id), "%s needs nothing", name);
    bool supported = bop2nd_isa_supported(id) == 1;
    CHECK(supported == (bop2nd::table_of(id) != nullptr), "%s", name);
    CHECK(supported == (bop2nd::training_of(id) != nullptr), "%s", name);
    CHECK((bop2nd_isa_force(id) == 0) == supported, "%s", name);
    CHECK(!supported || bop2nd_isa_active() == id, "%s", name);
    if (!supported) continue;
    best = id;
    check_complete(id, name);
  }
  for (int id : {-2, count, 99}) {
    CHECK(bop2nd_isa_force(id) == -1, "%d", id);
    CHECK(!bop2nd_isa_name(id) && !bop2nd_isa_supported(id) && bop2nd_isa_calls(id) == 0, "%d", id);
    CHECK(!bop2nd::table_of(id) && !bop2nd::training_of(id), "%d", id);
  }
  CHECK(bop2nd_isa_force(-1) == 0 && bop2nd_isa_active() == best, "best is %d", best);
}
