// gaussian_filter_cuda
