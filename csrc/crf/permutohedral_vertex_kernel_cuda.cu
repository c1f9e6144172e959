// permutohedral_vertex_kernel_cuda
