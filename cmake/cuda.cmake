# PYCOMPRESS_CUDA=AUTO|ON|OFF: finds the CUDA compiler and says in one line what follows from it.
#
# Sets PYCOMPRESS_HAVE_CUDA, and where it is true CMAKE_CUDA_COMPILER and CMAKE_CUDA_ARCHITECTURES.
#   AUTO  the CUDA module is built where a compiler is found that can build it
#   ON    without such a compiler the configuration stops
#   OFF   nothing is looked for

# sm_100 and sm_120 came with 12.8. The older CMake knows no sm_90a.
set(PYCOMPRESS_OLDEST_NVCC 12.8)
set(PYCOMPRESS_OLDEST_CMAKE_FOR_CUDA 3.25)
# 90a and not 90: what was compiled for 90 runs there too, and the a costs nothing. The last one is for GPUs to come.
set(PYCOMPRESS_CUDA_TARGETS 80-real 86-real 89-real 90a-real 100-real 120)

set(PYCOMPRESS_CUDA AUTO CACHE STRING "Build the CUDA module: AUTO, ON or OFF")
set_property(CACHE PYCOMPRESS_CUDA PROPERTY STRINGS AUTO ON OFF)
string(TOUPPER "${PYCOMPRESS_CUDA}" pycompress_cuda_wanted)
if(NOT pycompress_cuda_wanted MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "PYCOMPRESS_CUDA=${PYCOMPRESS_CUDA}: expected AUTO, ON or OFF")
endif()

# Sets `why` to the reason why there is no CUDA, or to "" and nvcc, nvcc_version.
macro(pycompress_find_nvcc why)
  set(${why} "")
  set(nvcc "${CMAKE_CUDA_COMPILER}")
  if(NOT nvcc AND DEFINED ENV{CUDACXX})
    set(nvcc "$ENV{CUDACXX}")
  endif()
  if(NOT nvcc)
    find_program(PYCOMPRESS_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin NO_CMAKE_SYSTEM_PATH)
    set(nvcc "${PYCOMPRESS_NVCC}")
  endif()
  if(NOT nvcc)
    set(${why} "no nvcc on PATH, nor under CUDA_HOME or CUDA_PATH, and CUDACXX is not set")
  elseif(CMAKE_VERSION VERSION_LESS PYCOMPRESS_OLDEST_CMAKE_FOR_CUDA)
    set(${why} "CMake is ${CMAKE_VERSION}, CUDA needs ${PYCOMPRESS_OLDEST_CMAKE_FOR_CUDA}")
  else()
    execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE said ERROR_QUIET RESULT_VARIABLE status)
    string(REGEX MATCH "release ([0-9.]+)" found "${said}")
    set(nvcc_version "${CMAKE_MATCH_1}")
    if(NOT status EQUAL 0 OR NOT found)
      set(${why} "${nvcc} --version does not answer as nvcc does")
    elseif(nvcc_version VERSION_LESS PYCOMPRESS_OLDEST_NVCC)
      set(${why} "${nvcc} is ${nvcc_version}, ${PYCOMPRESS_OLDEST_NVCC} or newer is needed")
    else()
      if(DEFINED CMAKE_CUDA_COMPILER AND NOT CMAKE_CUDA_COMPILER)
        unset(CMAKE_CUDA_COMPILER CACHE)  # an earlier configuration's answer, which check_language would repeat
      endif()
      set(ENV{CUDACXX} "${nvcc}")  # where check_language looks
      check_language(CUDA)
      if(NOT CMAKE_CUDA_COMPILER)
        set(${why} "${nvcc} ${nvcc_version} cannot compile with this host compiler; see the CMake log")
      endif()
    endif()
  endif()
endmacro()

set(PYCOMPRESS_HAVE_CUDA OFF)
if(pycompress_cuda_wanted STREQUAL "OFF")
  message(STATUS "pycompress: no CUDA module (PYCOMPRESS_CUDA=OFF)")
  return()
endif()

include(CheckLanguage)
pycompress_find_nvcc(pycompress_why_not)
if(pycompress_why_not)
  if(pycompress_cuda_wanted STREQUAL "ON")
    message(FATAL_ERROR "PYCOMPRESS_CUDA=ON: ${pycompress_why_not}.\n"
      "Install the CUDA toolkit ${PYCOMPRESS_OLDEST_NVCC} or newer and put its bin folder on PATH, or set CUDACXX to its "
      "nvcc; or build without the CUDA module: PYCOMPRESS_CUDA=OFF")
  endif()
  message(STATUS "pycompress: no CUDA module (${pycompress_why_not})")
  return()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  # What this compiler still, or already, knows.
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known)
  set(CMAKE_CUDA_ARCHITECTURES "")
  foreach(target ${PYCOMPRESS_CUDA_TARGETS})
    string(REGEX MATCH "^[0-9]+" number ${target})
    if(known MATCHES "compute_${number}\n")
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${target})
    else()
      message(STATUS "pycompress: no CUDA code for ${target} (nvcc ${nvcc_version} does not know it)")
    endif()
  endforeach()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(PYCOMPRESS_HAVE_CUDA ON)
string(REPLACE ";" " " pycompress_shown "${CMAKE_CUDA_ARCHITECTURES}")
message(STATUS "pycompress: CUDA module for ${pycompress_shown} (nvcc ${nvcc_version}, ${CMAKE_CUDA_COMPILER})")
