# The target pyseg_sanitize carries the flags that PYSEG_SANITIZE asks for (none by default).

add_library(pyseg_sanitize INTERFACE)
if(PYSEG_SANITIZE)
  string(REPLACE ";" "," _sanitizers "${PYSEG_SANITIZE}")
  message(STATUS "pyseg: sanitizers ${_sanitizers}")
  target_compile_options(pyseg_sanitize INTERFACE
    -O1 -fsanitize=${_sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  target_link_options(pyseg_sanitize INTERFACE -fsanitize=${_sanitizers})
  if(NOT PYSEG_CUDA STREQUAL "OFF")
    message(FATAL_ERROR "pyseg: PYSEG_SANITIZE is for the CPU kernels, add -DPYSEG_CUDA=OFF")
  endif()
endif()
