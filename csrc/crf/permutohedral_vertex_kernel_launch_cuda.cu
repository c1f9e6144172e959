// Launches of permutohedral_vertex_kernel's kernels, CUB's prefix sum among them.
#include <cub/device/device_scan.cuh>

#include "crf/permutohedral_vertex_kernel_cuda.cuh"

namespace pyseg::crf {
namespace {

int64_t tiles_of(int64_t vertices) { return (vertices + kTileVertices - 1) / kTileVertices; }

// Calls f.template operator()<d>().
template <typename F>
cudaError_t with_dimension(int d, const F& f) {
  switch (d) {
    case 1: f.template operator()<1>(); break;
    case 2: f.template operator()<2>(); break;
    case 3: f.template operator()<3>(); break;
    case 4: f.template operator()<4>(); break;
    case 5: f.template operator()<5>(); break;
    case 6: f.template operator()<6>(); break;
    case 7: f.template operator()<7>(); break;
    default: f.template operator()<8>(); break;
  }
  return cudaGetLastError();
}

}  // namespace

int64_t box_elements(int64_t vertices, int d) { return tiles_of(vertices) * 2 * (d + 2); }

cudaError_t launch_vertex_kernel_rows(const VertexKernelTask& t, int64_t* row, void* temporary, size_t& bytes,
                                      cudaStream_t stream) {
  if (temporary != nullptr) {
    const auto tiles = static_cast<unsigned>(tiles_of(t.vertices));
    const cudaError_t error = with_dimension(t.d, [&]<int kD>() {
      vertex_boxes_kernel<kD><<<(tiles + kVertexWarps - 1) / kVertexWarps, kVertexThreads, 0, stream>>>(t);
      vertex_kernel_kernel<kD, float, false><<<tiles, kVertexThreads, 0, stream>>>(t, row, nullptr, nullptr);
    });
    if (error != cudaSuccess) return error;
  }
  return cub::DeviceScan::InclusiveSum(temporary, bytes, row, row, t.vertices + 1, stream);
}

cudaError_t launch_vertex_kernel(const VertexKernelTask& t, int64_t* row, int32_t* vertex, void* weight, bool float64,
                                 cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>(tiles_of(t.vertices));
  return with_dimension(t.d, [&]<int kD>() {
    if (float64)
      vertex_kernel_kernel<kD, double, true>
          <<<tiles, kVertexThreads, 0, stream>>>(t, row, vertex, static_cast<double*>(weight));
    else
      vertex_kernel_kernel<kD, float, true>
          <<<tiles, kVertexThreads, 0, stream>>>(t, row, vertex, static_cast<float*>(weight));
  });
}

}  // namespace pyseg::crf
