// atrous_conv2d_depthwise on CUDA: depthwise convolution.
