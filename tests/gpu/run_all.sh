#!/usr/bin/env bash
# Every check that needs a GPU, the most valuable first; if it runs out of time, finished stages leave their reports.
#
#   ./tests/gpu/run_all.sh [--seconds 480] [--output runs/gpu] [--only "build training mfu"] [--skip "peers"]
#
# Stages, each with its own time limit within the rest of --seconds:
#   machine     GPU, driver, versions
#   build       megagap with kernels for this GPU; without them the rest uses plain torch
#   training    the step, the loop, resuming and saving against the CPU
#   mfu         Gaperon 1B's training step, with its kernels by kind
#   layouts     processes that share the GPU, over gloo: gradients against the CPU in every kind of layout
#   predictions steps of several shapes, each beside tools/trace_step.py's prediction
#   kernels     bandwidth of each kernel, forward and backward, beside eager, torch.compile, Liger and quack
#   attention   every back end that torch has, on whole sequences
#   documents   the same on sequences packed from documents
#   loss        the output projection and its loss, by chunk size
#   peers       the same training step by transformers, and with Liger-Kernel
#   tests       each kernel against float64
#   sanitizer   small tests under compute-sanitizer (NVIDIA)
#
# Continues after a failure and lists at the end what failed. Without a GPU it runs the stages that a CPU can, at small
# sizes. MEGAGAP_PYTHON names a Python with torch for GPUs: see tools/environment.sh.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

seconds=480 reports=runs/gpu only="" skip=""
while (($#)); do
    case $1 in
    --seconds) seconds=$2 && shift 2 ;;
    --output) reports=$2 && shift 2 ;;
    --only) only=" $2 " && shift 2 ;;
    --skip) skip=" $2 " && shift 2 ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" && exit ;;
    *) echo "unknown argument $1; see --help" >&2 && exit 2 ;;
    esac
done
mkdir -p "$reports"
export PYTHONUNBUFFERED=1 COLUMNS=${COLUMNS:-140}

base=${MEGAGAP_PYTHON:-}
[[ -n $base ]] || { source tools/environment.sh && base=$PYTHON; }
target=$("$base" -c 'import torch
print("cpu" if not torch.cuda.is_available() else "hip" if torch.version.hip else "cuda")') || exit 2
device=$([[ $target == cpu ]] && echo cpu || echo cuda) # torch's name for AMD's, too
[[ $device == cuda ]] || echo "NOTE: torch sees no GPU: nothing here is measured or tested on one"
export MEGAGAP_BUILD=$target PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
PYTHON=$base

failed=()
# stage NAME LIMIT COMMAND...: its output in NAME.txt.
stage() {
    local name=$1 limit=$2 left=$((seconds - SECONDS)) started=$SECONDS
    shift 2
    [[ -z $only || $only == *" $name "* ]] && [[ $skip != *" $name "* ]] || return 0
    if ((left < 5)); then
        echo "== $name: no time left" && failed+=("$name (no time left)")
        return
    fi
    echo "== $name"
    timeout --kill-after=5 $((limit < left ? limit : left)) "$@" >"$reports/$name.txt" 2>&1 || failed+=("$name ($?)")
    tail -n "${TAIL:-30}" "$reports/$name.txt"
    echo "== $name: $((SECONDS - started)) s"
}

describe() {
    date
    lscpu | grep "Model name"
    { nvidia-smi || rocm-smi || true; } 2>/dev/null
    { nvcc --version | tail -2; } 2>/dev/null
    "$PYTHON" -c 'import sys, torch; print(sys.version, torch.__version__, torch.version.cuda, torch.version.hip)'
}
build() {
    "$PYTHON" setup.py build_ext --inplace && (cd / && "$PYTHON" -m megagap.ops)
}
export -f describe build
export PYTHON

TAIL=12 stage machine 20 bash -c describe
stage build 200 bash -c build
stage training 120 "$PYTHON" -m pytest -q -p no:cacheprovider -s tests/gpu/test_training.py tests/gpu/test_attention.py tests/gpu/test_muon.py
if [[ $device == cuda ]]; then
    recipe=examples/recipes/gaperon-1b-one-gpu.toml
    stage mfu 90 "$PYTHON" tools/benchmark_mfu.py $recipe --profile 3 --output "$reports"
    stage layouts 90 "$PYTHON" -m pytest -q -p no:cacheprovider -s tests/gpu/test_groups.py tests/gpu/test_layouts.py
    stage predictions 240 "$PYTHON" tests/benchmarks/predictions.py --device "${DEVICE:-h100}" --output "$reports"
    stage kernels 120 "$PYTHON" tests/benchmarks/kernels.py --device cuda --dtypes bfloat16 --rows 32768 --rounds 5 \
        --ops rms_norm add_rms_norm rotary swiglu adamw --output "$reports"
    stage attention 60 "$PYTHON" tests/benchmarks/attention.py --output "$reports"
    stage documents 40 "$PYTHON" tests/benchmarks/attention.py --documents 16 --output "$reports"
    stage loss 60 "$PYTHON" tests/benchmarks/loss.py --output "$reports"
    stage peers 90 "$PYTHON" tests/benchmarks/peers.py $recipe --output "$reports"
    stage tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu/test_kernels.py
    if command -v compute-sanitizer >/dev/null; then
        # Small shapes only: it is a hundred times slower.
        small="5x33 or 0x64 or 3x7x5x5x6 or 7x13 or 33x1003 or 100003"
        stage sanitizer 120 compute-sanitizer --tool memcheck --error-exitcode 1 \
            "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu/test_kernels.py -k "$small"
    fi
else
    stage mfu 90 "$PYTHON" tools/benchmark_mfu.py examples/recipes/quickstart.toml --parallel.tp 1 --parallel.pp 1 \
        --warmup 1 --steps 2 --output "$reports"
    stage kernels 120 "$PYTHON" tests/benchmarks/kernels.py --rows 256 --size 256 --rounds 1 --output "$reports"
    stage tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/gpu_source
fi

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "all passed; reports are in $reports"
