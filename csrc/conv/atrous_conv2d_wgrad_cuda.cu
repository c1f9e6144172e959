// atrous_conv2d_wgrad on CUDA: weight gradient.
