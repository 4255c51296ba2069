#!/usr/bin/env bash
# All that a machine with a GPU can show of the kernels: ./tests/gpu/run_all.sh [folder for the reports, default runs/gpu]
#
# Builds, lists registers and spills, runs the tests marked gpu, a short run under compute-sanitizer (NVIDIA), and the
# benchmark. Goes on after a failure and says at the end what failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
reports=${1:-runs/gpu}
mkdir -p "$reports"
source tools/environment.sh

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "torch sees no GPU here" >&2
    exit 1
}
export MEGAGAP_BUILD=${MEGAGAP_BUILD:-$("$PYTHON" -c 'import torch; print("hip" if torch.version.hip else "cuda")')}

failed=()
step() {
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$reports/$name.txt" || failed+=("$name")
}

step machine bash -c 'date; (nvidia-smi || rocm-smi) 2>/dev/null; nvcc --version 2>/dev/null | tail -2; hipcc --version 2>/dev/null
    "$0" -c "import sys, torch; print(sys.version, torch.__version__, torch.cuda.get_device_properties(0))"' "$PYTHON"
step build "$PYTHON" setup.py build_ext --inplace
step registers env PYTHON="$PYTHON" .ci/gpu_compile.sh --table
step tests "$PYTHON" -m pytest -m gpu -v tests
if command -v compute-sanitizer >/dev/null; then
    # Small shapes only: it is a hundred times slower.
    small="5x33 or 4099x129 or 0x64 or 3x7x5x5x6 or 7x13 or 33x1003 or 100003 or stochastic"
    for tool in memcheck racecheck synccheck; do
        step "$tool" compute-sanitizer --tool $tool --error-exitcode 1 "$PYTHON" -m pytest -m gpu tests/gpu -k "$small"
    done
else
    echo "NOTE: no compute-sanitizer here"
fi
step benchmark "$PYTHON" tests/benchmarks/kernels.py --device cuda

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "all passed; reports are in $reports"
