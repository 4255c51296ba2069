#!/usr/bin/env bash
# All that a machine with a GPU can show of the kernels: ./tests/gpu/run_all.sh [folder for the reports, default runs/gpu]
#
# Builds, lists registers and spills, tests, runs small tests under compute-sanitizer (NVIDIA), and benchmarks. Goes on
# after a failure and says at the end what failed. Without a GPU it does the same on the CPU, as far as that goes: the
# kernels run through their shim, and the benchmark is that of the CPU's kernels.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
reports=${1:-runs/gpu}
mkdir -p "$reports"
source tools/environment.sh

target=$("$PYTHON" -c 'import torch
print("cpu" if not torch.cuda.is_available() else "hip" if torch.version.hip else "cuda")')
device=$([[ $target == cpu ]] && echo cpu || echo cuda) # torch's name for AMD's, too
[[ $device == cuda ]] || echo "NOTE: torch sees no GPU: nothing here is measured or tested on one"
export MEGAGAP_BUILD=$target

failed=()
step() {
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$reports/$name.txt" || failed+=("$name")
}

step machine bash -c '{ date; lscpu | grep "Model name"; nvidia-smi || rocm-smi; nvcc --version | tail -2; } 2>/dev/null
    "$0" -c "import sys, torch; print(sys.version, torch.__version__, torch.version.cuda, torch.version.hip)"' "$PYTHON"
step build "$PYTHON" setup.py build_ext --inplace
step registers env PYTHON="$PYTHON" .ci/gpu_compile.sh --table
step tests "$PYTHON" -m pytest -v tests/ops tests/gpu
if [[ $target == cuda ]] && command -v compute-sanitizer >/dev/null; then
    # Small shapes only: it is a hundred times slower.
    small="5x33 or 4099x129 or 0x64 or 3x7x5x5x6 or 7x13 or 33x1003 or 100003 or stochastic"
    for tool in memcheck racecheck synccheck; do
        step "$tool" compute-sanitizer --tool $tool --error-exitcode 1 "$PYTHON" -m pytest -m gpu tests/gpu -k "$small"
    done
else
    echo "NOTE: no compute-sanitizer, or no GPU for it"
fi
step benchmark "$PYTHON" tests/benchmarks/kernels.py --device "$device" --output "$reports"
step training-step "$PYTHON" tests/benchmarks/step.py

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "all passed; reports are in $reports"
