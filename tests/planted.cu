// Kernels with known faults and known costs, for test_check_cuda.py and test_cuda_runner.py.
#include <cuda_runtime.h>

namespace pyseg::planted {

// y = factor * x: 8 bytes an element, one multiplication.
template <class T>
__global__ void scale(const T* x, T* y, int n, T factor) {  // [n], [n]
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = factor * x[i];
}

// Reads one element past the end of x.
__global__ void overrun(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i + 1];
}

// 96 live values in 64 registers.
__global__ void __launch_bounds__(1024) spilling(float* x, int rounds) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; i++) v[i] = x[i * 1024 + threadIdx.x];
  for (int k = 0; k < rounds; k++) {
#pragma unroll
    for (int i = 0; i < 96; i++) v[i] = v[i] * v[(i + 7) % 96] + x[k * 1024 + threadIdx.x];
  }
#pragma unroll
  for (int i = 0; i < 96; i++) x[i * 1024 + threadIdx.x] = v[i];
}

// An array with indices that the compiler does not know lies in local memory.
__global__ void local_array(float* x, int n) {
  float v[40];
  for (int i = 0; i < n; i++) v[i * 7 % 40] = x[i];
  x[threadIdx.x] = v[x[5] > 0 ? n : 3];
}

// 40 KiB of shared memory for one warp.
__global__ void crowded(float* x) {
  __shared__ float s[10240];
  for (int i = threadIdx.x; i < 10240; i += 32) s[i] = x[i % 32];
  __syncwarp();
  x[threadIdx.x] = s[(threadIdx.x * 37) % 10240];
}

// d = a b for 16x8 and 8x8 halves in the order of the fragments: 1024 multiply-adds, by the tensor cores and without.
__global__ void tensor_product(const unsigned* a, const unsigned* b, float* d) {  // [2, 32], [32], [4, 32]
#if __CUDA_ARCH__ >= 750
  float c[4] = {};
  int t = threadIdx.x;
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[t]), "r"(a[32 + t]), "r"(b[t]));
  for (int i = 0; i < 4; i++) d[32 * i + t] = c[i];
#endif
}
__global__ void scalar_product(const float* a, const float* b, float* d) {  // [16, 8], [8, 8], [16, 8]
  for (int i = threadIdx.x; i < 128; i += 32) {
    float sum = 0;
    for (int k = 0; k < 8; k++) sum = fmaf(a[i / 8 * 8 + k], b[k * 8 + i % 8], sum);
    d[i] = sum;
  }
}

}  // namespace pyseg::planted

using namespace pyseg::planted;

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void launch_scale(const float* x, float* y, int n) { scale<<<(n + 63) / 64, 64>>>(x, y, n, 2.f); }
EXPORT void launch_overrun(const float* x, float* y, int n) { overrun<<<(n + 63) / 64, 64>>>(x, y, n); }
EXPORT void launch_tensor_product(const void* a, const void* b, float* d) {
  tensor_product<<<1, 32>>>(static_cast<const unsigned*>(a), static_cast<const unsigned*>(b), d);
}
EXPORT void launch_scalar_product(const float* a, const float* b, float* d) { scalar_product<<<1, 32>>>(a, b, d); }
EXPORT void launch_unsupported() {
  cudaGraph_t graph;
  cudaGraphCreate(&graph, 0);
}
template __global__ void pyseg::planted::scale<double>(const double*, double*, int, double);
