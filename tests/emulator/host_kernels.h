// Lets g++ compile the CUDA kernels of this project and run them on the CPU, one thread after
// another. One .cpp file holds, in this order:
//
//     #include "host_kernels.h"
//     #include "../../edgetrack/runtime/kernels/frame.cu"
//     EXPORT_FRAME_KERNELS
//
// It, or another file, defines what the driver gives to kernels:
//
//     extern "C" void cudaGraphSetConditional(unsigned long long handle, unsigned int value);
//
// Compile: g++ -std=c++17 -O2 -fPIC -shared -ffp-contract=off file.cpp -o file.so
// (kernels are compiled with --fmad=false, so neither may the host fuse a product and a sum).
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
inline thread_local uint3 blockIdx, threadIdx, blockDim, gridDim;

template <typename Value>
inline Value __ldg(const Value* address) {
  return *address;
}
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
template <typename Value>
inline Value min(Value a, Value b) {
  return b < a ? b : a;
}
template <typename Value>
inline Value max(Value a, Value b) {
  return a < b ? b : a;
}

namespace host_kernels {

constexpr int kMaxParameters = 16;

// Calls a kernel for each thread of a grid; `params` point to the arguments, as for cuLaunchKernel.
template <typename... Arguments, std::size_t... Index>
void run(void (*kernel)(Arguments...), const unsigned grid[3], const unsigned block[3],
         void** params, std::index_sequence<Index...>) {
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  uint3 b, t;
  for (b.z = 0; b.z < grid[2]; ++b.z)
    for (b.y = 0; b.y < grid[1]; ++b.y)
      for (b.x = 0; b.x < grid[0]; ++b.x)
        for (t.z = 0; t.z < block[2]; ++t.z)
          for (t.y = 0; t.y < block[1]; ++t.y)
            for (t.x = 0; t.x < block[0]; ++t.x) {
              blockIdx = b;
              threadIdx = t;
              kernel(*static_cast<Arguments*>(params[Index])...);
            }
}

template <typename... Arguments>
int launch(void (*kernel)(Arguments...), const unsigned grid[3], const unsigned block[3],
           void** params) {
  run(kernel, grid, block, params, std::index_sequence_for<Arguments...>{});
  return 1;
}

template <typename... Arguments>
int parameter_sizes(void (*)(Arguments...), unsigned* sizes) {
  static_assert(sizeof...(Arguments) <= kMaxParameters, "more parameters than callers make room for");
  ((*sizes++ = sizeof(Arguments)), ...);
  return sizeof...(Arguments);
}

}  // namespace host_kernels

#define FRAME_KERNELS(DO)   \
  DO(edgetrack_crop)        \
  DO(edgetrack_gate)        \
  DO(edgetrack_gate_with_head) \
  DO(edgetrack_gate_flag)   \
  DO(edgetrack_settle)      \
  DO(edgetrack_tell)        \
  DO(edgetrack_carry)       \
  DO(edgetrack_probe)
#define HOST_KERNELS_LAUNCH(kernel) \
  if (!std::strcmp(name, #kernel)) return host_kernels::launch(kernel, grid, block, params);
#define HOST_KERNELS_SIZES(kernel) \
  if (!std::strcmp(name, #kernel)) return host_kernels::parameter_sizes(kernel, sizes);

// emulated_kernel_launch: runs a kernel to its end; 1, or 0 where there is none of that name.
// emulated_kernel_parameters: writes the size of each parameter in bytes, at most 16 (each is
// aligned to its own size); their number, or -1 where there is no kernel of that name.
#define EXPORT_FRAME_KERNELS                                                                      \
  extern "C" int emulated_kernel_launch(const char* name, const unsigned grid[3],                 \
                                        const unsigned block[3], void** params) {                 \
    FRAME_KERNELS(HOST_KERNELS_LAUNCH)                                                            \
    return 0;                                                                                     \
  }                                                                                               \
  extern "C" int emulated_kernel_parameters(const char* name, unsigned sizes[16]) {               \
    FRAME_KERNELS(HOST_KERNELS_SIZES)                                                             \
    return -1;                                                                                    \
  }
