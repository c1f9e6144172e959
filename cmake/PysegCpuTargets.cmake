# pyseg_add_cpu_targets(module sources...): compiles the sources once per instruction set into the module.
#
# The sources are torch-free and put all of their code into the namespace pyseg::${PYSEG_TARGET}, so that no function
# compiled for a newer processor can stand in for one that runs on every processor; tests/test_symbols.py checks it.
# csrc/common/cpu_capability.cpp chooses among the targets at load time.

function(pyseg_add_cpu_target module name flags)
  set(target pyseg_cpu_${name})
  add_library(${target} OBJECT ${ARGN})
  target_include_directories(${target} PRIVATE csrc)
  target_compile_definitions(${target} PRIVATE PYSEG_TARGET=${name})
  # Sums may use fused multiply-adds; nothing else that changes results is allowed. Kernels throw nothing, and what cleans
  # up behind exceptions would be a symbol that targets share.
  target_compile_options(${target} PRIVATE -O3 -Wall -Wextra -ffp-contract=fast -fno-math-errno -fno-trapping-math -fno-exceptions
                         ${flags})
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  target_link_libraries(${target} PRIVATE pyseg_sanitize)
  target_sources(${module} PRIVATE $<TARGET_OBJECTS:${target}>)
endfunction()

function(pyseg_add_cpu_targets module)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    pyseg_add_cpu_target(${module} baseline "" ${ARGN})
  elseif(PYSEG_SANITIZE)
    # One target, with the widest vectors that developers' machines have: instrumented code takes long to compile.
    file(STRINGS /proc/cpuinfo avx2 REGEX "^flags.* avx2 " LIMIT_COUNT 1)
    pyseg_add_cpu_target(${module} baseline "-march=x86-64-v$<IF:$<BOOL:${avx2}>,3,2>" ${ARGN})
  else()
    pyseg_add_cpu_target(${module} baseline "-march=x86-64-v2" ${ARGN})
    pyseg_add_cpu_target(${module} avx2 "-march=x86-64-v3" ${ARGN})
    pyseg_add_cpu_target(${module} avx512 "-march=x86-64-v4;-mprefer-vector-width=512" ${ARGN})
    # Tells the dispatching sources that the other targets exist.
    target_compile_definitions(${module} PRIVATE PYSEG_X86_TARGETS)
  endif()
endfunction()
