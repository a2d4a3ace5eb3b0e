#!/usr/bin/env bash
# system_packages.sh PYTHON [PROGRAM...]: the Debian packages that the build needs and that are
# missing, and those that have the name of a PROGRAM that is missing. Installs them where it may (root, or sudo without a password); else says which command would. Eigen and
# GoogleTest can also be downloaded by CMake, so without them it goes on.
set -euo pipefail
python=$1
shift
required=() optional=()
for program in "$@"; do
  command -v "$program" >/dev/null || required+=("$program")
done

command -v g++ >/dev/null || required+=(g++)
facts=$("$python" - <<'PY'
import os, sys, sysconfig
def has(name):
    try: __import__(name)
    except ImportError: return False
    return True
print(f"python{sys.version_info[0]}.{sys.version_info[1]}",
      int(has("venv") and has("ensurepip")),
      int(os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))))
PY
)
read -r name has_venv has_headers <<<"$facts"
((has_venv)) || required+=("$name-venv")
((has_headers)) || required+=("$name-dev")
deps=${HEADWISE_DEPS:-.deps}
[ -e /usr/include/eigen3/Eigen/Core ] || [ -e "$deps/include/eigen3/Eigen/Core" ] || optional+=(libeigen3-dev)
[ -e /usr/include/gtest/gtest.h ] || [ -e "$deps/src/googletest" ] || optional+=(libgtest-dev)
missing=("${required[@]}" "${optional[@]}")
((${#missing[@]})) || exit 0

as_root=()
if [ "$(id -u)" != 0 ]; then
  if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then as_root=(sudo -n); else as_root=(no); fi
fi
if command -v apt-get >/dev/null && [ "${as_root[0]:-}" != no ]; then
  echo "Installing Debian packages: ${missing[*]}"
  "${as_root[@]}" apt-get update -q >/dev/null || true
  if "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null; then
    exit 0
  fi
fi
if ((${#required[@]})); then
  echo "These packages are missing and cannot be installed from here. Run, then try again:" >&2
  echo "    sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "Not installed: ${missing[*]}; CMake will download them."
