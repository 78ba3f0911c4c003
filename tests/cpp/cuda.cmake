# Host-side tests of csrc/cuda: index arithmetic, and kernel bodies run by emulated blocks. No CUDA needed.
# Include from the top CMakeLists.txt after enable_testing().
add_library(cuda_emulated STATIC EXCLUDE_FROM_ALL ${CMAKE_CURRENT_LIST_DIR}/cuda_emulated_launch.cpp)
target_compile_features(cuda_emulated PUBLIC cxx_std_17)
target_compile_options(cuda_emulated PUBLIC -O2 -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off)
foreach(name index matmul step)
  add_executable(cuda_${name}_test ${CMAKE_CURRENT_LIST_DIR}/cuda_${name}_test.cpp)
  target_link_libraries(cuda_${name}_test PRIVATE cuda_emulated)
  add_test(NAME cuda_${name} COMMAND cuda_${name}_test)
endforeach()
