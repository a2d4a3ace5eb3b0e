#!/usr/bin/env bash
# gpu_check.sh [STEP...]: what a machine with a GPU and no network can tell of headwise. Steps:
#   build     compiles for the Python that holds torch and the GPU at hand; what the machine lacks
#             comes along in HEADWISE_DEPS (`make gpu-deps`)
#   tests     the tests of the device "cuda"
#   sanitize  a few of them under compute-sanitizer
#   bench     benchmarks/gpu_check.py: checks, times, compares with the goals
#   rehearse  the benchmark without a GPU: small shapes on the emulated device of the tests, in what
#             `make build` compiled; measures nothing and writes no results
# Without a step: build, tests, bench. With words behind `--`, only these groups of the benchmark
# (gpu_check.py --help), as in `gpu_check.sh build bench -- forward decode`.
#
# Everything goes to GPU_CHECK_OUT (benchmarks/results): logs, the rows of the benchmark as they are
# measured, and gpu_libraries.tar.gz, what build compiled. Steps can be called one by one, on a new
# machine each: where that archive is found in GPU_CHECK_IN (GPU_CHECK_OUT), build unpacks it
# instead of compiling, and where the rows are found, bench goes on behind them. All ends within
# GPU_CHECK_SECONDS (570), and what is cut short is said.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${GPU_CHECK_OUT:-benchmarks/results}")
from=$(realpath -m "${GPU_CHECK_IN:-$out}")
build=build-gpu deps=$(realpath -m "${HEADWISE_DEPS:-.deps}")
limit=${GPU_CHECK_SECONDS:-570}
mkdir -p "$out"
steps=() groups=()
while (($#)); do
  case $1 in
    build | tests | sanitize | bench | rehearse) steps+=("$1") ;;
    --) shift; groups=("$@"); break ;;
    *) echo "gpu-check: a step is build, tests, sanitize, bench or rehearse, not '$1'" >&2; exit 2 ;;
  esac
  shift
done
((${#steps[@]})) || steps=(build tests bench)

python=$(command -v python3)
"$python" -c 'import torch' 2>/dev/null || python=$PWD/.venv/bin/python
if ! "$python" -c 'import torch' 2>/dev/null; then
  echo "gpu-check: neither python3 nor .venv holds torch; run \`make setup\` first" >&2
  exit 1
fi
PATH="$(dirname "$python"):$PWD/.venv/bin:$PATH"
libraries=${LD_LIBRARY_PATH:-}
# Libraries from another machine look for each other where they were compiled.
export PYTHONPATH=python PYTHONUNBUFFERED=1 LD_LIBRARY_PATH="$PWD/$build/src:$libraries"
capability=$("$python" -c \
  'import torch; print(*torch.cuda.get_device_capability(), sep="")' 2>/dev/null || true)
left() { echo $((limit - SECONDS)); }  # SECONDS: since this script began

fingerprint() {  # of the sources, the Python and the architecture
  { cat $(find src include python/bindings CMakeLists.txt -type f | LC_ALL=C sort)
    "$python" -c 'import sys, torch; print(sys.version, torch.__version__)'
    echo "$capability"; } | sha256sum | cut -c1-16
}

build() {
  local archive=gpu_libraries.tar.gz print
  print=$(fingerprint)
  if [ "$(tar -xzOf "$from/$archive" gpu_libraries.txt 2>/dev/null)" = "$print" ]; then
    tar -xzf "$from/$archive" --exclude gpu_libraries.txt
    echo "build: the libraries of $from/$archive"
    [ "$from" = "$out" ] || cp "$from/$archive" "$out/"
    return
  fi
  command -v cmake >/dev/null || { echo "gpu-check: cmake was not found" >&2; return 1; }
  local generator=("Unix Makefiles") architecture=() launcher=()
  command -v ninja >/dev/null && generator=(Ninja)
  # Only this machine's GPU, where nvcc knows it: else machine code for others, and PTX.
  case $capability in
    '' | [1-7]?) ;;
    90) architecture=(-DHEADWISE_CUDA_ARCHITECTURES=90a-real) ;;
    *) nvcc --list-gpu-arch 2>/dev/null | grep -qx "compute_$capability" &&
      architecture=("-DHEADWISE_CUDA_ARCHITECTURES=$capability-real") ;;
  esac
  command -v ccache >/dev/null &&
    launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
  cmake -S . -B "$build" -G "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DHEADWISE_CUDA=ON \
    -DHEADWISE_PYTHON=ON -DHEADWISE_TESTS=OFF -DHEADWISE_DOWNLOAD=OFF -DHEADWISE_DEPS="$deps" \
    -DPython_EXECUTABLE="$python" "${architecture[@]}" "${launcher[@]}" \
    >"$out/gpu_build.log" 2>&1 ||
    { tail -n 40 "$out/gpu_build.log"; return 1; }
  timeout "$(left)" cmake --build "$build" --parallel "${JOBS:-$(tools/jobs.sh)}" \
    >>"$out/gpu_build.log" 2>&1 || {
    grep -E 'error|Error' "$out/gpu_build.log" | head -n 20 | cut -c1-300
    tail -n 20 "$out/gpu_build.log" | cut -c1-300
    return 1
  }
  echo "$print" >gpu_libraries.txt
  tar -czf "$out/$archive" gpu_libraries.txt "$build"/src/libheadwise.so* python/headwise/_C*.so \
    python/headwise/_build_info.py
  rm gpu_libraries.txt
}

tests() {
  # A kernel that dies or hangs takes its process along: tests run in processes that are replaced.
  local spread=()
  "$python" -c 'import xdist' 2>/dev/null && spread=(-n 4 --max-worker-restart=30)
  "$python" -c 'import pytest_timeout' 2>/dev/null && spread+=(--timeout=60 --timeout-method=thread)
  timeout --signal=INT "$(($(left) > 330 ? 300 : $(left) - 20))" "$python" -m pytest -q --tb=short \
    -p no:cacheprovider "${spread[@]}" --maxfail=40 tests/python/ops/test_cuda.py \
    >"$out/gpu_tests.log" 2>&1
  local status=$?
  grep -E '^(FAILED|ERROR)|crashed' "$out/gpu_tests.log" | cut -c1-160 | head -n 20
  tail -n 1 "$out/gpu_tests.log"
  return $status
}

sanitize() {
  command -v compute-sanitizer >/dev/null ||
    { echo "sanitize: compute-sanitizer was not found"; return 1; }
  local tool status=0
  # No graphs among them: without a cache of memory (below) nothing can be captured.
  local some='test_several_tiles or test_core_widths or test_one_row or test_results_do_not_change'
  some+=' or test_attention_statistics and causal'
  some+=' or (test_widths or test_decoding or by_warpgroup) and bfloat16 and not hidden'
  for tool in memcheck racecheck synccheck initcheck; do
    (($(left) > 60)) || { echo "sanitize: no time left for $tool"; status=1; continue; }
    # Without a cache of memory, every tensor is an allocation of its own.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(($(left) > 150 ? 130 : $(left) - 20))" \
      compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
      "$python" -m pytest -q -x -p no:cacheprovider tests/python/ops/test_cuda.py -k "$some" \
      >"$out/gpu_$tool.log" 2>&1
    local code=$?
    echo "sanitize: $tool: exit status $code (9: found something, 124: no time);" \
      "$(grep -E 'SUMMARY' "$out/gpu_$tool.log" | tail -n 1)"
    ((code == 0)) && continue
    status=1
    grep -E '^=+ +(Error|Invalid|Race|Uninit|Barrier|.*at 0x|.*at void)' "$out/gpu_$tool.log" |
      head -n 4 | cut -c1-200
  done
  return $status
}

bench() {
  local name
  name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_"))')
  [ "$from" = "$out" ] || cp "$from/gpu_$name.jsonl" "$out/" 2>/dev/null
  "$python" benchmarks/gpu_check.py "${groups[@]}" --rows "$out/gpu_$name.jsonl" \
    --seconds "$(($(left) - 15))"
}

rehearse() {
  LD_LIBRARY_PATH=$libraries "$python" benchmarks/gpu_check.py --rehearse "${groups[@]}" \
    --seconds "$(($(left) - 15))"
}

failed=0
for step in "${steps[@]}"; do
  if [ -z "$capability" ] && [ "$step" != build ] && [ "$step" != rehearse ]; then
    echo "gpu-check: torch sees no GPU here: $step is left out"
    continue
  fi
  (($(left) > 30)) || { echo "gpu-check: no time left for $step"; failed=1; continue; }
  $step
  status=$?
  echo "gpu-check: $step $([ $status = 0 ] && echo done || echo FAILED) after $SECONDS s"
  ((status == 0)) || failed=1
  # Nothing runs on what did not compile.
  [ "$step" = build ] && ((status)) && break
done
exit $failed
