#!/usr/bin/env bash
# What srun starts on each node: examples/multi_node/launch.sh with the arguments given here, and signals forwarded.
# Slurm signals the tasks it started, not their children; and SIGUSR1 ends torchrun, so it is forwarded to the workers.
set -uo pipefail

(
    trap '' USR1 # in case it still reaches torchrun; the workers set their own handler
    exec examples/multi_node/launch.sh "$@"
) &
agent=$!
trap 'pkill -USR1 --parent "$agent"' USR1
trap 'kill -TERM "$agent"' TERM

# A signal interrupts wait before the agent has ended.
while kill -0 "$agent" 2>/dev/null; do
    wait "$agent"
done
wait "$agent" # bash remembers its exit status
exit $?
