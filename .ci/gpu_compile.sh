#!/usr/bin/env bash
# Compiles csrc/gpu for NVIDIA and AMD GPUs, with what compilers there are: nvcc for sm_80 and sm_90, hipcc for gfx90a,
# gfx908 (waves of 64) and gfx1030 (of 32). Reports registers; a kernel that spills them to memory is a failure. No GPU
# is needed and nothing is kept.
#
#   .ci/gpu_compile.sh            the most registers of each source and architecture
#   .ci/gpu_compile.sh --table    of every kernel
#
# As root with apt, hipcc is installed where it is missing (Debian's packages, 370 MB). PYTHON names a Python with torch,
# to check the bindings' types.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
table=${1:-}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if ! command -v hipcc >/dev/null && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    { apt-get update -qq && apt-get install -qq --no-install-recommends hipcc libamdhip64-dev; } >/dev/null 2>&1 ||
        echo "note: apt-get could not install hipcc and libamdhip64-dev" >&2
fi
jobs=()
for source in csrc/gpu/*.cu; do
    if command -v nvcc >/dev/null; then
        for arch in sm_80 sm_90; do
            jobs+=("nvcc -std=c++17 -O3 -Werror all-warnings -Xptxas -v -arch=$arch -Icsrc -c $source $arch")
        done
    fi
    if command -v hipcc >/dev/null; then
        for arch in gfx90a gfx908 gfx1030; do
            # With nvcc on PATH, hipcc takes itself for a wrapper of it.
            jobs+=("env HIP_PLATFORM=amd hipcc -std=c++17 -O3 -Wall -Werror --offload-arch=$arch -Rpass-analysis=kernel-resource-usage -Icsrc -c $source $arch")
        done
    fi
done
for compiler in nvcc hipcc; do
    command -v $compiler >/dev/null || echo "NOTE: no $compiler here: csrc/gpu is NOT compiled with it" >&2
done

# The last two words of a job are its source and its architecture, which name its files.
compile() {
    local job=$1 arch=${1##* } command=${1% *}
    local name=$folder/$(basename "${command##* }" .cu).$arch
    $command -o "$name.o" >"$name.log" 2>&1 || touch "$name.failed"
}
export -f compile
export folder
if ((${#jobs[@]})); then
    printf '%s\n' "${jobs[@]}" | xargs -P "$(nproc)" -I{} bash -c 'compile "$1"' _ {}
fi

failed=0
for log in "$folder"/*.failed; do
    [[ -e $log ]] || continue
    echo "csrc/gpu does not compile: $(basename "$log" .failed)" >&2
    cat "${log%.failed}.log" >&2
    failed=1
done
# One line a kernel: registers, bytes or registers spilled, name.
for log in "$folder"/*.log; do
    [[ -e $log && ! -e ${log%.log}.failed ]] || continue
    c++filt <"$log" | awk '
        /Compiling entry function/ { name = $0; sub(/^[^\x27]*\x27/, "", name); spilled = 0 }
        /bytes spill stores/       { spilled = $0; sub(/.*frame, /, "", spilled); spilled += 0 }
        /Used [0-9]+ registers/    { registers = $0; sub(/.*Used /, "", registers); print_kernel() }
        /Function Name:/           { name = $0; sub(/.*Function Name: /, "", name) }
        /remark: +VGPRs:/          { registers = $0; sub(/.*VGPRs: /, "", registers) }
        /VGPRs Spill:/             { spilled = $0; sub(/.*Spill: /, "", spilled); print_kernel() }
        function print_kernel() {
            if (match(name, /[a-z_]+kernel(<[^(]*>)?\(/)) name = substr(name, RSTART, RLENGTH - 1)
            gsub(/megagap::gpu::/, "", name)
            print registers + 0, spilled + 0, name
        }' >"${log%.log}.kernels"
    label=$(basename "$log" .log)
    if [[ ! -s ${log%.log}.kernels ]]; then
        echo "no register counts from the compiler for $label" >&2
        failed=1
    elif [[ $table == --table ]]; then
        awk -v label="$label" '{ count = $1; spill = $2; $1 = $2 = ""; printf "%-24s %4d registers %4d spilled %s\n", label, count, spill, $0 }' "${log%.log}.kernels"
    else
        sort -n "${log%.log}.kernels" | awk -v label="$label" '{ count = $1 } END { printf "%-24s %2d kernels, at most %3d registers\n", label, NR, count }'
    fi
    if ! awk -v label="$label" '$2 > 0 { print label ": spills registers:", $0 > "/dev/stderr"; bad = 1 } END { exit bad }' "${log%.log}.kernels"; then
        failed=1
    fi
done

# The bindings need no GPU compiler, only torch's headers.
if "${PYTHON:-python3}" -c 'import torch' 2>/dev/null; then
    includes=$("${PYTHON:-python3}" -c 'from torch.utils.cpp_extension import include_paths
print(*(f"-isystem {path}" for path in include_paths()))')
    # shellcheck disable=SC2086  (words)
    ${CXX:-c++} -std=c++20 -fsyntax-only -Wall -Wextra -Werror -Icsrc $includes csrc/gpu/bindings.cpp || failed=1
else
    echo "NOTE: no torch for ${PYTHON:-python3}: csrc/gpu/bindings.cpp is NOT checked" >&2
fi
exit "$failed"
