// The CPU kernels for x86-64-v4 (AVX-512).

#pragma GCC target("arch=x86-64-v4")

#define EMA_EXT_LEVEL x86_64_v4
#define EMA_EXT_VECTOR_BYTES 64
#define EMA_EXT_KERNELS kKernelsX86_64V4
#include "cpu/levels/kernels.inc"
