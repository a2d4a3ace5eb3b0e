#!/usr/bin/env bash
# gpu_deps.sh FOLDER PYTHON: collects what `make gpu-check` needs on a machine without network:
# the headers of Eigen, nlohmann/json and pybind11, and the sources of GoogleTest.
set -euo pipefail
folder=$1 python=$2
package() {
  "$python" -c "import importlib.util as u; print(u.find_spec('$1').submodule_search_locations[0])"
}
first() {  # the first of these that exists
  local path
  for path in "$@"; do [ -e "$path" ] && { echo "$path"; return; }; done
  echo "gpu-deps: none of these is there: $*" >&2
  return 1
}
eigen=$(first /usr/include/eigen3/Eigen build/_deps/eigen-src/Eigen)
googletest=$(first /usr/src/googletest build/_deps/googletest-src)
rm -rf "$folder"
mkdir -p "$folder/include/eigen3" "$folder/src"
cp -RL "$eigen" "$folder/include/eigen3/"
cp -RL "$(package nlohmann_json)/include/nlohmann" "$folder/include/"
cp -RL "$(package pybind11)" "$folder/pybind11"
cp -RL "$googletest" "$folder/src/googletest"
find "$folder" -name __pycache__ -prune -exec rm -rf {} +
du -sh "$folder"
