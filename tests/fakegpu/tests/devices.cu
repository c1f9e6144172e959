// Capabilities, several devices and what is separate for each of them.
//   devices capability SM ARCH     FAKEGPU_SM=SM takes the PTX of compute_ARCH
//   devices two                    with FAKEGPU_DEVICES=2
//   devices count N                cudaGetDeviceCount says N
//   devices other                  the mistake: a kernel on device 1 reads memory of device 0
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

__constant__ int table[4];
__device__ int counter = 5;

__global__ void architecture_kernel(int* out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}
__global__ void symbols_kernel(int* out) {
  out[0] = table[1];
  out[1] = atomicAdd(&counter, 1);
}
__global__ void shared_kernel(int* out) {
  extern __shared__ int s[];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = s[31 - threadIdx.x];
}
__global__ void copy_kernel(const int* in, int* out) { *out = *in; }

int bad = 0;
void verdict(const char* name, bool ok) {
  printf("%s %s\n", ok ? "PASS" : "FAIL", name);
  bad += !ok;
}
template <class T>
T* allocate(int n) {
  T* p = nullptr;
  cudaMalloc(&p, n * sizeof(T));
  return p;
}

void capability(int sm, int arch) {
  int *out = allocate<int>(32), host[32] = {};
  architecture_kernel<<<1, 1>>>(out);
  cudaMemcpy(host, out, 4, cudaMemcpyDeviceToHost);
  verdict("newest PTX not above the capability", host[0] == arch * 10);
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, 0);
  verdict("capability", p.major * 10 + p.minor == sm);
  int most = sm == 75 ? 64 << 10 : sm == 80 ? 163 << 10 : 227 << 10;
  verdict("shared memory of a block", int(p.sharedMemPerBlockOptin) == most);
  verdict("threads of a multiprocessor", p.maxThreadsPerMultiProcessor == (sm == 75 ? 1024 : 2048));
  auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  verdict("too much shared memory", cudaFuncSetAttribute(shared_kernel, attribute, most + 1) == cudaErrorInvalidValue);
  cudaGetLastError();
  verdict("most shared memory", cudaFuncSetAttribute(shared_kernel, attribute, most) == cudaSuccess);
  shared_kernel<<<1, 32, most>>>(out);
  cudaMemcpy(host, out, 128, cudaMemcpyDeviceToHost);
  verdict("kernel with the most shared memory", cudaGetLastError() == cudaSuccess && host[0] == 31);
}

void two() {
  int n = 0, device = -1, host[2] = {}, four[4] = {1, 2, 3, 4};
  cudaGetDeviceCount(&n);
  verdict("two devices", n == 2 && cudaSetDevice(2) == cudaErrorInvalidDevice && cudaGetLastError());
  cudaMemcpyToSymbol(table, four, sizeof four);
  int* first = allocate<int>(32);
  cudaStream_t stream_of_0;
  cudaEvent_t event_of_0;
  cudaStreamCreate(&stream_of_0);
  cudaEventCreate(&event_of_0);
  symbols_kernel<<<1, 1>>>(first);
  cudaFuncSetAttribute(shared_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 60 << 10);
  shared_kernel<<<1, 32, 60 << 10>>>(first + 0);
  verdict("raised limit of shared memory", cudaGetLastError() == cudaSuccess);
  symbols_kernel<<<1, 1>>>(first);

  cudaSetDevice(1);
  verdict("current device", cudaGetDevice(&device) == cudaSuccess && device == 1);
  int* second = allocate<int>(32);
  symbols_kernel<<<1, 1>>>(second);
  cudaMemcpy(host, second, 8, cudaMemcpyDeviceToHost);
  verdict("__constant__ and __device__ variables of each device", host[0] == 0 && host[1] == 5);
  cudaMemcpy(host, first, 8, cudaMemcpyDeviceToHost);
  verdict("memory of the other device through cudaMemcpy", host[0] == 2 && host[1] == 6);
  shared_kernel<<<1, 32, 60 << 10>>>(second);
  verdict("limit of shared memory holds for one device", cudaGetLastError() == cudaErrorInvalidValue);
  symbols_kernel<<<1, 1, 0, stream_of_0>>>(second);
  verdict("stream of another device", cudaGetLastError() == cudaErrorInvalidResourceHandle);
  verdict("event of another device", cudaEventRecord(event_of_0, 0) == cudaErrorInvalidResourceHandle && cudaGetLastError());
  cudaMemcpyPeerAsync(second, 1, first, 0, 4, 0);
  cudaMemcpy(host, second, 4, cudaMemcpyDeviceToHost);
  verdict("copy between devices", host[0] == 2);
  cudaPointerAttributes a, b;
  cudaPointerGetAttributes(&a, first);
  cudaPointerGetAttributes(&b, second);
  verdict("device of a pointer", a.device == 0 && b.device == 1);
  size_t free0, free1, total;
  cudaMemGetInfo(&free1, &total);
  cudaSetDevice(0);
  allocate<char>(1 << 20);
  cudaMemGetInfo(&free0, &total);
  verdict("memory in use by device", free0 < free1 && total > free0);
}

int main(int argc, char** argv) {
  if (!strcmp(argv[1], "capability")) capability(atoi(argv[2]), atoi(argv[3]));
  if (!strcmp(argv[1], "two")) two();
  if (!strcmp(argv[1], "count")) {
    int n = -1;
    cudaError_t e = cudaGetDeviceCount(&n);
    verdict("number of devices", n == atoi(argv[2]) && (n ? e == cudaSuccess : e == cudaErrorNoDevice));
  }
  if (!strcmp(argv[1], "other")) {
    int* first = allocate<int>(1);
    cudaSetDevice(1);
    copy_kernel<<<1, 1>>>(first, allocate<int>(1));
    puts("NOT CAUGHT");
  }
  return bad;
}
