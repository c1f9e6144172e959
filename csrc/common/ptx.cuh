// Inline PTX of sm_80 and above behind names: asynchronous copies, matrix loads, tensor-core products.
// Torch-free. In code compiled for older architectures the wrappers do nothing: launchers never send kernels that use
// them to such devices.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define PYSEG_PTX_SM80 1
#else
#define PYSEG_PTX_SM80 0
#endif

namespace pyseg::ptx {

// The 32-bit address of a shared-memory object, which the instructions below take.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts the copy of kBytes (4, 8 or 16, both addresses aligned to them) from global to shared memory; where `valid` is
// false writes zeros and reads nothing. Cached in L1 too, for data that the block reads again.
template <int kBytes>
__device__ inline void cp_async(uint32_t shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "the sizes that cp.async knows");
#if PYSEG_PTX_SM80
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared), "l"(global), "n"(kBytes),
               "r"(valid ? kBytes : 0)
               : "memory");
#endif
}

// 16 bytes past L1, for data that the block reads once.
__device__ inline void cp_async_16(uint32_t shared, const void* global, bool valid) {
#if PYSEG_PTX_SM80
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// Closes the group of copies that this thread started since the last commit.
__device__ inline void cp_async_commit() {
#if PYSEG_PTX_SM80
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's newest groups are unfinished.
template <int kPending>
__device__ inline void cp_async_wait() {
#if PYSEG_PTX_SM80
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit elements (or 8 x 4 of 32-bit ones). Lane 8 * i + j gives the address of row j (16 bytes,
// aligned) of matrix i; r[i] receives the 4 bytes at row lane / 4, column pair lane % 4 of matrix i.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
#if PYSEG_PTX_SM80
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
#endif
}

// The same with each matrix transposed on the way (16-bit elements only).
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
#if PYSEG_PTX_SM80
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
#endif
}

// float to tf32, to nearest (the bare product would cut the low bits off).
__device__ inline uint32_t to_tf32(uint32_t float_bits) {
  uint32_t out = float_bits;
#if PYSEG_PTX_SM80
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(out) : "f"(__uint_as_float(float_bits)));
#endif
  return out;
}

// d += a * b with float32 sums; a [16, 32 bytes of k], b [32 bytes of k, 8] in the fragments that ldmatrix_x4 loads from
// rows along k. With g = lane / 4, t = lane % 4: d[0], d[1] are row g, columns 2t, 2t + 1; d[2], d[3] those of row g + 8.
template <typename T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// k = 16
template <>
__device__ inline void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if PYSEG_PTX_SM80
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// k = 16
template <>
__device__ inline void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if PYSEG_PTX_SM80
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// k = 8; the operands must be tf32 (to_tf32)
template <>
__device__ inline void mma<float>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if PYSEG_PTX_SM80
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace pyseg::ptx
