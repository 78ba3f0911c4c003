// SPDX-License-Identifier: Apache-2.0
// The limits between the product kernels, one entry each: the number, why it is that number, and what
// measured it (null: reasoned from the machine code and the chips' data sheets, never timed). binary_plan.h
// decides by them, and bop2nd_fast/gpu_dispatch.py shows them beside Triton's.
#pragma once

namespace bop2nd::cuda {

struct DispatchLimit {
  const char* what;
  int value;
  const char* reason;
  const char* measured;
};

namespace limits {

constexpr DispatchLimit kSkinnyRows{"linear: popcount kernel up to this many rows", 8,
                                    "up to some 4 rows reading the weights bounds such a product, then "
                                    "popcounts do; of a tensor-core tile half "
                                    "the rows would idle",
                                    nullptr};
constexpr DispatchLimit kNarrowOutputs{"64-column tiles (256x64, 64x64) up to this many outputs of a group",
                                       64, "half of a 128-column tile would be empty", nullptr};
constexpr DispatchLimit kTilesPerMultiprocessor{
    "tiles larger than 64x64 from this many of them per multiprocessor on", 1,
    "with fewer, part of the chip would idle; smaller tiles fill it", nullptr};
constexpr DispatchLimit kSplitStages{"split k: a slice has at least this many stages of 512 bits", 4,
                                     "fewer would not fill the pipeline of asynchronous copies", nullptr};
constexpr DispatchLimit kSplitBlocks{"split k: as many slices as give this many blocks per multiprocessor", 2,
                                     "one block copies while the other multiplies", nullptr};

constexpr const DispatchLimit* kAll[] = {&kSkinnyRows, &kNarrowOutputs, &kTilesPerMultiprocessor,
                                         &kSplitStages, &kSplitBlocks};

}  // namespace limits
}  // namespace bop2nd::cuda
