// The CPU kernels for x86-64 baseline (SSE2).

#define EMA_EXT_LEVEL x86_64
#define EMA_EXT_VECTOR_BYTES 16
#define EMA_EXT_KERNELS kKernelsX86_64
#include "cpu/levels/kernels.inc"
