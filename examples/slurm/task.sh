#!/usr/bin/env bash
# What srun starts on each node: examples/multi_node/launch.sh with the arguments given here, and signals forwarded.
# Slurm signals the tasks it started, not their children; and SIGUSR1 ends torchrun, so it is forwarded to the workers.
set -uo pipefail

# Whether a process holds or handles SIGUSR1. Workers do soon after they start; before, they would ignore it.
takes_notices() {
    local name mask
    while read -r name mask; do
        case $name in SigBlk: | SigCgt:) ((16#$mask & 1 << 9)) && return 0 ;; esac
    done <"/proc/$1/status"
    return 1
}

# SIGUSR1 for the workers, as soon as there are some that do not ignore it. Slurm sends it once.
notify() {
    local pid told=
    while [[ -z $told ]] && kill -0 "$agent"; do
        for pid in $(pgrep --parent "$agent"); do
            takes_notices "$pid" && kill -USR1 "$pid" && told=yes
        done
        [[ $told ]] || sleep 1
    done 2>/dev/null
}

(
    trap '' USR1 # in case it still reaches torchrun; the workers hold and handle it
    exec examples/multi_node/launch.sh "$@"
) &
agent=$!
trap 'notify &' USR1
trap 'kill -TERM "$agent"' TERM

# A signal interrupts wait before the agent has ended.
while kill -0 "$agent" 2>/dev/null; do
    wait "$agent"
done
wait "$agent" # bash remembers its exit status
exit $?
