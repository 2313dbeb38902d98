#!/usr/bin/env bash
# Proof and measurement on a machine with an NVIDIA GPU, in one go and under ten minutes on an H200: builds from source
# without a network, runs every test, compute-sanitizer over the kernels, and all benchmarks.
#
#   benchmarks/on_gpu.sh [RESULTS_FOLDER]          default benchmarks/results
#
# Needs nvcc, torch with CUDA, scikit-build-core, pybind11, cmake, ninja, pytest and hypothesis. A step that fails does not
# stop the others; the exit status is the number of steps that failed.
set -u
cd "$(dirname "$0")/.."
results=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
python=${PYTHON:-python3}
failed=0

step() {
  local name=$1 begun=$SECONDS
  shift
  echo "=== $name"
  if "$@"; then echo "=== $name: passed in $((SECONDS - begun)) s"; else
    echo "=== $name: FAILED after $((SECONDS - begun)) s"
    failed=$((failed + 1))
  fi
}

sanitize() {
  local tool=$1
  # Small cases only: the sanitizer slows kernels down a hundredfold. PyTorch's own allocator is switched off so that each
  # tensor has an allocation of its own, past whose end a store is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 240 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    --kernel-regex kns=longlive "$python" -m pytest -q -p no:cacheprovider \
    tests/ops/test_insert.py tests/ops/test_retrieve.py tests/ops/test_attend.py tests/ops/test_pack.py \
    -k "cuda and not video_sizes and not million and not 32_bit and not any_shape"
}

architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
[ "$architecture" = 90 ] && architecture=90a
export CUDAARCHS="${architecture}-real" CMAKE_BUILD_PARALLEL_LEVEL=4
step build "$python" -m pip install --quiet --no-build-isolation --no-deps --config-settings=cmake.define.LONGLIVE_RAG_CUDA=ON .
step info "$python" -m longlive_rag info
step "tests on the GPU" timeout 240 "$python" -m pytest -q -m cuda tests
step memcheck sanitize memcheck
step racecheck sanitize racecheck
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z_')
for benchmark in insert retrieve attend pack layer block encoder; do
  step "benchmark $benchmark" timeout 120 "$python" -m longlive_rag bench "$benchmark" \
    --json "$results/${benchmark}_$name.json" --plot "$results/${benchmark}_$name.png"
done
if [ "$architecture" = 90a ]; then
  step "attend on Hopper" timeout 300 "$python" -m longlive_rag bench attend --sweep --json "$results/attend_sweep_$name.json"
fi
echo "=== $failed steps failed"
exit "$failed"
