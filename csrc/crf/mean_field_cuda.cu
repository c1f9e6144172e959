// mean_field_cuda
