// The CPU kernels for x86-64-v3 (AVX2, FMA, F16C).

#pragma GCC target("arch=x86-64-v3")

#define EMA_EXT_LEVEL x86_64_v3
#define EMA_EXT_VECTOR_BYTES 32
#define EMA_EXT_KERNELS kKernelsX86_64V3
#include "cpu/levels/kernels.inc"
