# pyseg_add_module(name sources...): a pybind11 extension module of the package pyseg that links torch.

execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir OUTPUT_VARIABLE pybind11_DIR
                OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(pybind11 CONFIG REQUIRED)

file(STRINGS pyproject.toml _version REGEX "^version = ")
string(REGEX MATCH "[0-9][^\"]*" PYSEG_VERSION "${_version}")

function(pyseg_add_module name)
  python_add_library(${name} MODULE WITH_SOABI ${ARGN})
  target_include_directories(${name} PRIVATE csrc)
  target_link_libraries(${name} PRIVATE pyseg_torch pyseg_sanitize pybind11::headers)
  target_compile_definitions(${name} PRIVATE
    PYSEG_VERSION="${PYSEG_VERSION}"
    PYSEG_TORCH_VERSION="${PYSEG_TORCH_VERSION}"
    PYSEG_CXX_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    PYSEG_CUDA_VERSION="$<$<BOOL:${PYSEG_WITH_CUDA}>:${CMAKE_CUDA_COMPILER_VERSION}>")
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
  # pyseg lies beside torch and nvidia in site-packages; the tree that an in-place build runs from does not, but there
  # torch has loaded its libraries before.
  set_target_properties(${name} PROPERTIES
    CXX_VISIBILITY_PRESET hidden
    CUDA_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    INSTALL_RPATH "$ORIGIN/../torch/lib")
  if(PYSEG_INPLACE)
    set_target_properties(${name} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/pyseg)
  endif()
  install(TARGETS ${name} LIBRARY DESTINATION pyseg)
endfunction()
