# Host-side tests of csrc/cuda: index arithmetic, and kernel bodies run by emulated blocks. No CUDA needed.
# Include from the top CMakeLists.txt after enable_testing().
foreach(name index matmul step)
  add_executable(cuda_${name}_test ${CMAKE_CURRENT_LIST_DIR}/cuda_${name}_test.cpp)
  target_compile_features(cuda_${name}_test PRIVATE cxx_std_17)
  target_compile_options(cuda_${name}_test PRIVATE -O2 -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off)
  add_test(NAME cuda_${name} COMMAND cuda_${name}_test)
endforeach()
