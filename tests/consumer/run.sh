#!/usr/bin/env bash
# run.sh find_package|add_subdirectory BUILD
# Builds and runs the consumer with the compilers, the generator and the torch of headwise's own
# build folder BUILD: against what `cmake --install` puts beside it, or with the sources embedded.
set -euo pipefail
way=$1 build=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
work="$build/consumer-$way"

cached() { sed -n "s/^$1:[A-Z]*=//p" "$build/CMakeCache.txt"; }
cmake=$(cached CMAKE_COMMAND)
options=(-G "$(cached CMAKE_GENERATOR)" -DCMAKE_BUILD_TYPE=Release
  -DCMAKE_CXX_COMPILER="$(cached CMAKE_CXX_COMPILER)"
  -DCMAKE_CXX_COMPILER_LAUNCHER="$(cached CMAKE_CXX_COMPILER_LAUNCHER)"
  -DCMAKE_MAKE_PROGRAM="$(cached CMAKE_MAKE_PROGRAM)"
  -DPython_EXECUTABLE="$(cached Python_EXECUTABLE)")

case $way in
  find_package)
    rm -rf "$work/prefix"
    "$cmake" --install "$build" --prefix "$work/prefix" >/dev/null
    options+=(-DCMAKE_PREFIX_PATH="$work/prefix" -DTorch_DIR="$(cached Torch_DIR)") ;;
  add_subdirectory)
    # Embedded, headwise builds the library alone; without CUDA, so that both builds are tried, and
    # without optimisation, which is not what is tried here.
    options+=(-DHEADWISE_SOURCE_DIR="$(cd "$here/../.." && pwd)" -DHEADWISE_CUDA=OFF
      -DCMAKE_CXX_FLAGS_RELEASE=-O0
      -DTorch_DIR="$(cached Torch_DIR)") ;;
  *) echo "run.sh: find_package or add_subdirectory, not '$way'" >&2; exit 2 ;;
esac

"$cmake" -S "$here" -B "$work/build" "${options[@]}" >"$work.log" 2>&1 || { cat "$work.log"; exit 1; }
"$cmake" --build "$work/build" --parallel "${HEADWISE_JOBS:-2}" >>"$work.log" 2>&1 ||
  { tail -n 60 "$work.log"; exit 1; }
"$work/build/consumer"
