#!/usr/bin/env bash
# Makes the environment if need be, builds, and runs the tests: ./tests/run.sh [pytest arguments]
#
#   ./tests/run.sh                        all tests but those that need a GPU where there is none, long ones, and benchmarks
#   ./tests/run.sh -m long                the long ones, of minutes each
#   ./tests/run.sh tests/data -k order    some of them; paths are relative to the checkout
#
# MEGAGAP_EXPLORE=1 lets tests over random examples look for new ones.
# --help installs and runs nothing; pytest's own: .venv/bin/python -m pytest --help.
# MEGAGAP_VENV and MEGAGAP_PYTHON choose the environment: see tools/environment.sh.
set -euo pipefail
for argument; do
    if [[ $argument == -h || $argument == --help ]]; then
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit
    fi
done
source "$(dirname "${BASH_SOURCE[0]}")/../tools/environment.sh"
cd "$MEGAGAP_ROOT"

# Hundreds of processes import megagap; without its bytecode each compiles it, which is a third of what a command takes.
unset PYTHONDONTWRITEBYTECODE

options=()
if [[ ! " $* " =~ " -m" ]]; then
    chosen="not long"
    { [[ -e /dev/nvidia0 || -e /dev/kfd ]] &&
        "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; } || chosen+=" and not gpu"
    options+=(-m "$chosen")
fi
if [[ ! " $* " =~ tests/benchmarks ]]; then
    options+=(--ignore=tests/benchmarks)
fi
# Of the whole suite, several files run at a time; much of it waits for processes to start.
if [[ ! " $* " =~ " "(tests/|-n|-k|--collect-only) ]]; then
    cores=$(nproc 2>/dev/null || echo 2)
    options+=(-n "$((cores < 4 ? cores : 4))" --dist loadfile --no-loadscope-reorder)
fi
exec "$PYTHON" -m pytest "${options[@]}" "$@"
