// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <array>
#include <atomic>
#include <cstring>

#include "isa_tables.h"
#include "target.h"

#if BOP2ND_X86
#include <cpuid.h>
#endif
#if BOP2ND_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if BOP2ND_NEON && defined(__linux__)
#include <sys/auxv.h>
#endif

#define BOP2ND_EXPORT extern "C" __attribute__((visibility("default")))

namespace bop2nd {
namespace {

enum Feature : uint32_t {
  kAvx2 = 1u << 0,    // AVX2, FMA, F16C, POPCNT, BMI, BMI2 and the operating system saves ymm registers
  kAvx512 = 1u << 1,  // F, BW, VL, DQ and the operating system saves zmm registers
  kBitalg = 1u << 2,  // BITALG and VNNI
  kAmx = 1u << 3,     // AMX-TILE, AMX-INT8, VBMI, GFNI, and the operating system lets this process use tiles
  kNeon = 1u << 4,
  kDotProduct = 1u << 5,  // UDOT
};

#if BOP2ND_X86
uint64_t saved_registers() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool has(uint32_t flags, uint32_t bits) { return (flags & bits) == bits; }

// Linux makes room for a process's tile registers only when asked to.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

uint32_t detect() {
  uint32_t a, b, c, d, b7, c7, d7;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  constexpr uint32_t kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29, kPopcnt = 1u << 23,
                     kFma = 1u << 12;
  if (!has(c, kOsxsave | kAvx | kFma | kF16c | kPopcnt)) return 0;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return 0;
  uint64_t saved = saved_registers();
  constexpr uint32_t kBmi = 1u << 3, kAvx2Bit = 1u << 5, kBmi2 = 1u << 8;
  if ((saved & 0x6) != 0x6 || !has(b7, kBmi | kAvx2Bit | kBmi2)) return 0;
  uint32_t features = kAvx2;
  constexpr uint32_t kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  if ((saved & 0xE6) != 0xE6 || !has(b7, kF | kDq | kBw | kVl)) return features;
  features |= kAvx512;
  if (has(c7, 1u << 11 | 1u << 12)) features |= kBitalg;
  constexpr uint32_t kVbmi = 1u << 1, kGfni = 1u << 8, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  constexpr uint64_t kTileState = 3u << 17;
  if ((saved & kTileState) == kTileState && has(c7, kVbmi | kGfni) && has(d7, kAmxTile | kAmxInt8) &&
      tiles_granted())
    features |= kAmx;
  return features;
}
#elif BOP2ND_NEON
uint32_t detect() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kAsimdDp ? kNeon | kDotProduct : kNeon;
#elif defined(__ARM_FEATURE_DOTPROD)
  return kNeon | kDotProduct;
#else
  return kNeon;
#endif
}
#else
uint32_t detect() { return 0; }
#endif

struct Isa {
  const char* name;
  const char* requires_text;
  uint32_t needs;
  KernelTable (*make)();  // null where this build has no such code
};

// The best one that is supported is the default. Python and the tests read names and texts from here.
#define BOP2ND_ISA(name, training, code, needs, text) {#name, text, needs, BOP2ND_IF_##code(name)},
const Isa kIsas[] = {BOP2ND_INSTRUCTION_SETS(BOP2ND_ISA)};
#undef BOP2ND_ISA
constexpr int kCount = kIsaCount;

std::atomic<int> forced{-1};
std::atomic<const KernelTable*> overriding{nullptr};
std::atomic<int64_t> calls[kCount];

bool known(int id) { return id >= 0 && id < kCount; }

bool supported(int id) {
  static const uint32_t features = detect();
  return known(id) && kIsas[id].make && (features & kIsas[id].needs) == kIsas[id].needs;
}

int active() {
  int id = forced.load(std::memory_order_relaxed);
  if (id >= 0) return id;
  static const int best = [] {
    int last = 0;
    for (int i = 0; i < kCount; ++i) last = supported(i) ? i : last;
    return last;
  }();
  return best;
}

}  // namespace

const KernelTable* table_of(int id) {
  if (!supported(id)) return nullptr;
  static const std::array<KernelTable, kCount> tables = [] {
    std::array<KernelTable, kCount> made{};
    for (int i = 0; i < kCount; ++i) {
      if (supported(i)) made[i] = kIsas[i].make();
    }
    return made;
  }();
  return &tables[id];
}

int id_of(const char* name) {
  for (int id = 0; id < kCount; ++id) {
    if (std::strcmp(kIsas[id].name, name) == 0) return id;
  }
  return -1;
}

void override_table(const KernelTable* table) { overriding.store(table, std::memory_order_relaxed); }

const KernelTable& active_table() {
  if (const KernelTable* table = overriding.load(std::memory_order_relaxed)) return *table;
  int id = active();
  calls[id].fetch_add(1, std::memory_order_relaxed);
  return *table_of(id);
}

}  // namespace bop2nd

BOP2ND_EXPORT int bop2nd_isa_count(void) { return bop2nd::kCount; }

BOP2ND_EXPORT const char* bop2nd_isa_name(int id) {
  return bop2nd::known(id) ? bop2nd::kIsas[id].name : nullptr;
}

BOP2ND_EXPORT int bop2nd_isa_supported(int id) { return bop2nd::supported(id) ? 1 : 0; }

BOP2ND_EXPORT const char* bop2nd_isa_requires(int id) {
  return bop2nd::known(id) ? bop2nd::kIsas[id].requires_text : nullptr;
}

BOP2ND_EXPORT int bop2nd_isa_active(void) { return bop2nd::active(); }

BOP2ND_EXPORT int bop2nd_isa_force(int id) {
  if (id != -1 && !bop2nd::supported(id)) return -1;
  bop2nd::forced.store(id, std::memory_order_relaxed);
  return 0;
}

BOP2ND_EXPORT int64_t bop2nd_isa_calls(int id) {
  return bop2nd::known(id) ? bop2nd::calls[id].load(std::memory_order_relaxed) : 0;
}
