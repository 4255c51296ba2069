#!/usr/bin/env bash
# Submit one of Gaperon's recipes to Slurm, on 32 nodes of 8 GPUs or dies, from the checkout:
#
#   examples/gaperon/submit.sh NAME [--section.key value ...]      NAME: 1b-young, 8b-black-pepper, …
#
# SBATCH_PARTITION, SBATCH_ACCOUNT and the like are read by sbatch; requeueing is examples/slurm/train.sbatch's.
set -euo pipefail

if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 0
fi
name=$1
cd "$(dirname "$0")/../.."
recipe=examples/recipes/gaperon/$name.toml
if [[ ! -f $recipe ]]; then
    echo "there is no $recipe; there are: $(cd examples/recipes/gaperon && echo *.toml)" >&2
    exit 2
fi
exec sbatch --nodes "${NODES:-32}" --gpus-per-node 8 --job-name "gaperon-$name" \
    examples/slurm/train.sbatch "$recipe" "${@:2}"
