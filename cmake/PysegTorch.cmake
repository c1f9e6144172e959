# Finds torch by its import spec, without importing it, and makes the target pyseg_torch.
#
# Not find_package(Torch): that fails where the CUDA toolkit lacks parts which pyseg never uses, and it overrides
# CMAKE_CUDA_ARCHITECTURES. Sets PYSEG_TORCH_DIR, PYSEG_TORCH_VERSION and PYSEG_TORCH_CUDA (empty for a CPU build).

set(_find_torch [=[
import importlib.util, os, runpy, sys
spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit("torch is not installed for " + sys.executable)
folder = os.path.dirname(spec.origin)
facts = runpy.run_path(os.path.join(folder, "version.py"))
print(folder, facts["__version__"], facts["cuda"] or "", sep=";")
]=])
execute_process(COMMAND ${Python_EXECUTABLE} -c "${_find_torch}" OUTPUT_VARIABLE _torch ERROR_VARIABLE _error
                RESULT_VARIABLE _failed OUTPUT_STRIP_TRAILING_WHITESPACE)
if(_failed)
  message(FATAL_ERROR "pyseg: cannot find torch: ${_error}")
endif()
list(GET _torch 0 PYSEG_TORCH_DIR)
list(GET _torch 1 PYSEG_TORCH_VERSION)
list(GET _torch 2 PYSEG_TORCH_CUDA)
if(PYSEG_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "pyseg: needs torch 2.11 or later to build, found ${PYSEG_TORCH_VERSION} in ${PYSEG_TORCH_DIR}")
endif()
message(STATUS "pyseg: torch ${PYSEG_TORCH_VERSION} in ${PYSEG_TORCH_DIR}")

# pyseg_torch_library(VARIABLE name): the path of one of torch's shared libraries.
function(pyseg_torch_library variable name)
  find_library(${variable} ${name} PATHS ${PYSEG_TORCH_DIR}/lib NO_DEFAULT_PATH NO_CACHE REQUIRED)
  set(${variable} ${${variable}} PARENT_SCOPE)
endfunction()

pyseg_torch_library(_torch_cpu torch_cpu)
pyseg_torch_library(_c10 c10)
add_library(pyseg_torch INTERFACE)
target_include_directories(pyseg_torch SYSTEM INTERFACE
  ${PYSEG_TORCH_DIR}/include ${PYSEG_TORCH_DIR}/include/torch/csrc/api/include)
target_link_libraries(pyseg_torch INTERFACE ${_torch_cpu} ${_c10})
# Hides everything in torch's stable ABI that is newer than 2.11, so that the result runs under 2.11 and later.
target_compile_definitions(pyseg_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
