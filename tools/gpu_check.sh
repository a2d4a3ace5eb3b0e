#!/usr/bin/env bash
# gpu_check.sh [BUILD]: compiles headwise with CUDA for the Python that holds torch, then runs the
# tests of the device "cuda" and benchmarks/gpu_check.py, which writes benchmarks/results/.
# Needs no network: what the machine lacks comes along in HEADWISE_DEPS (`make gpu-deps`).
# Ends within GPU_CHECK_SECONDS (570): the benchmark starts no case for which no time is left, and
# says which ones. Called again, it finds everything compiled and measures more.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build-gpu}
deps=$(realpath -m "${HEADWISE_DEPS:-.deps}")

python=$(command -v python3)
"$python" -c 'import torch' 2>/dev/null || python=$PWD/.venv/bin/python
if ! "$python" -c 'import torch' 2>/dev/null; then
  echo "gpu-check: neither python3 nor .venv holds torch; run \`make setup\` first" >&2
  exit 1
fi
PATH="$(dirname "$python"):$PWD/.venv/bin:$PATH"
command -v cmake >/dev/null || { echo "gpu-check: cmake was not found" >&2; exit 1; }
generator=("Unix Makefiles")
command -v ninja >/dev/null && generator=(Ninja)

# Only this machine's GPU: sm_90a where it is a Hopper, else whatever each source supports.
architecture=()
capability=$("$python" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")' 2>/dev/null || true)
[ "$capability" = 90 ] && architecture=(-DHEADWISE_CUDA_ARCHITECTURES=90a-real)

launcher=()
command -v ccache >/dev/null && launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
cmake -S . -B "$build" -G "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DHEADWISE_CUDA=ON \
  -DHEADWISE_PYTHON=ON -DHEADWISE_TESTS=OFF -DHEADWISE_DOWNLOAD=OFF -DHEADWISE_DEPS="$deps" \
  -DPython_EXECUTABLE="$python" "${architecture[@]}" "${launcher[@]}" >"$build-configure.log" 2>&1 ||
  { tail -n 40 "$build-configure.log"; exit 1; }
cmake --build "$build" --parallel "$(tools/jobs.sh)"

if [ -z "$capability" ]; then
  echo "gpu-check: compiled; torch sees no GPU here, so nothing was run"
  exit 0
fi
limit=${GPU_CHECK_SECONDS:-570}
left() { echo $((limit - SECONDS)); }  # SECONDS: since this script began
echo "gpu-check: compiled after $SECONDS s"
failed=0
# A wrong result on one shape fails many cases: the first twenty say enough.
PYTHONPATH=python timeout --signal=INT $(($(left) / 2)) "$python" -m pytest -q --maxfail=20 \
  tests/python/test_cuda*.py || failed=1
echo "gpu-check: tested after $SECONDS s"
PYTHONPATH=python timeout "$(left)" "$python" benchmarks/gpu_check.py --seconds $(($(left) - 45)) ||
  failed=1
exit $failed
