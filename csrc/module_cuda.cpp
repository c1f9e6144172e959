// The extension module pyseg._C_cuda: loading it registers the CUDA kernels of the operators that pyseg._C defines.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) { m.attr("architectures") = PYSEG_CUDA_ARCHITECTURES; }
