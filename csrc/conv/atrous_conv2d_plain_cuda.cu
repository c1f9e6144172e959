// atrous_conv2d_plain on CUDA: dense convolution without tensor cores.
