// atrous_conv2d on CUDA: dense convolution on tensor cores.
