// mean_field_launch_cuda
