# Decides whether _C_cuda is built (PYSEG_WITH_CUDA), and for which architectures; pyseg_add_cuda_module builds it.

# CMAKE_CUDA_ARCHITECTURES from the user (or CUDAARCHS) is obeyed as it is, virtual ones included. A number without a
# suffix means machine code and PTX. A development build covers what the tests run: machine code for the static gate,
# PTX for tests/fakegpu, 75 for the paths below sm_80; any newer GPU compiles the PTX when it loads it.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  if(PYSEG_ALL_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "75-real;80-real;86-real;89-real;90-real;100-real;120")
  else()
    set(CMAKE_CUDA_ARCHITECTURES "75-virtual;80;90")
  endif()
endif()

include(CheckLanguage)
if(PYSEG_CUDA STREQUAL "OFF")
  set(_reason "PYSEG_CUDA=OFF")
elseif(NOT PYSEG_CUDA MATCHES "^(AUTO|ON)$")
  message(FATAL_ERROR "pyseg: PYSEG_CUDA must be AUTO, ON or OFF, got ${PYSEG_CUDA}")
elseif(NOT PYSEG_TORCH_CUDA)
  set(_reason "torch ${PYSEG_TORCH_VERSION} is a CPU build")
else()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    string(REGEX MATCH "^[0-9]+" _torch_major "${PYSEG_TORCH_CUDA}")
    string(REGEX MATCH "^[0-9]+" PYSEG_CUDA_MAJOR "${CMAKE_CUDA_COMPILER_VERSION}")
    if(NOT _torch_major EQUAL PYSEG_CUDA_MAJOR)
      set(_reason "nvcc is version ${CMAKE_CUDA_COMPILER_VERSION}, torch was built with CUDA ${PYSEG_TORCH_CUDA}")
    endif()
  else()
    set(_reason "no CUDA compiler: nvcc is not on PATH, and neither CUDACXX nor CMAKE_CUDA_COMPILER names a working one")
  endif()
endif()

if(NOT _reason)
  set(PYSEG_WITH_CUDA ON)
  message(STATUS "pyseg: CUDA kernels are built with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES} "
                 "(PYSEG_CUDA=${PYSEG_CUDA}; torch has CUDA ${PYSEG_TORCH_CUDA})")
elseif(PYSEG_CUDA STREQUAL "ON")
  message(FATAL_ERROR "pyseg: PYSEG_CUDA=ON, but ${_reason}")
else()
  set(PYSEG_WITH_CUDA OFF)
  message(STATUS "pyseg: CUDA kernels are not built: ${_reason}")
endif()

function(pyseg_add_cuda_module name)
  pyseg_add_module(${name} ${ARGN})
  pyseg_torch_library(_torch_cuda torch_cuda)
  target_link_libraries(${name} PRIVATE ${_torch_cuda})
  # Checks and launches without a kernel of their own are C++: nvcc would parse torch's headers once an architecture.
  target_include_directories(${name} SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
  target_compile_definitions(${name} PRIVATE
    USE_CUDA
    PYSEG_CUDA_ARCHITECTURES="${architectures}")
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall -lineinfo>)
  # The CUDA runtime that torch brings is already in the process; a second, static one would have its own state.
  set_target_properties(${name} PROPERTIES
    CUDA_RUNTIME_LIBRARY Shared
    INSTALL_RPATH "$ORIGIN/../torch/lib;$ORIGIN/../nvidia/cu${PYSEG_CUDA_MAJOR}/lib")
endfunction()
