#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'USAGE'
Train on several machines: start the same command on each of them, in any order, within five minutes.

  ./examples/multi_node/launch.sh --first HOST[:PORT] --nodes N RECIPE.toml [--section.key value ...]

  --first HOST[:PORT]   one of the machines, by a name or IPv4 address that all of them can reach; default port: 29400
  --nodes N             how many machines; 2:4 goes on with any number from 2 to 4 as machines are lost or join
  --restarts N          how often to go on by itself from the newest checkpoint after a failure; default: 0
  --processes N         processes on each machine; default: its number of GPUs, or of cores if it has none
  --address IP          this machine's address for the others; default: the one on its route to HOST

MEGAGAP_VENV=path: a virtual environment other than .venv; MEGAGAP_PYTHON=python: an environment that already has torch.
GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: network interfaces, if the automatic choice is wrong. See README.md here.
USAGE
}

fail() {
    echo "launch: $*" >&2
    exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
python=${MEGAGAP_PYTHON:-${MEGAGAP_VENV:-$here/../../.venv}/bin/python}

first='' nodes='' processes=auto restarts=0 address=()
while (($#)); do
    case $1 in
    --first | --nodes | --restarts | --processes | --address)
        (($# > 1)) || fail "$1 needs a value"
        case $1 in
        --first) first=$2 ;;
        --nodes) nodes=$2 ;;
        --restarts) restarts=$2 ;;
        --processes) processes=$2 ;;
        --address) address=("$2") ;;
        esac
        shift 2
        ;;
    -h | --help)
        usage
        exit
        ;;
    -*) fail "unknown option $1 before the recipe; see --help" ;;
    *) break ;;
    esac
done
[[ -n $first ]] || fail "--first is missing; see --help"
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "--nodes must be the number of machines; see --help"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts must be a number; see --help"
(($#)) || fail "the recipe is missing; see --help"
command -v "$python" >/dev/null ||
    fail "no $python: set up first, with ./tests/run.sh or ./examples/quickstart.sh, or set MEGAGAP_PYTHON"

host=${first%:*} port=29400
[[ $first != *:* ]] || port=${first##*:}

node=$("$python" "$here/this_node.py" "$host" ${address[@]+"${address[@]}"}) || exit 2
read -r own interface is_first <<<"$node"
if [[ -z ${GLOO_SOCKET_IFNAME:-} && $interface != - ]]; then
    export GLOO_SOCKET_IFNAME=$interface
fi
# Seconds that torchrun gives its workers to save after a SIGTERM; 30 is too short for a large model.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

echo "launch: $own on ${GLOO_SOCKET_IFNAME:-any interface}, one of $nodes; meeting at $host:$port" >&2
if [[ $restarts != 0 || $nodes == *:* ]]; then
    # Else torchrun's agents wait for each other in vain once a machine has joined.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
# exec: torchrun replaces this process, so that whatever ends the script ends it, and with it the workers.
exec "$python" -m torch.distributed.run \
    --nnodes "$nodes" --nproc-per-node "$processes" --max-restarts "$restarts" --local-addr "$own" \
    --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "megagap-$(basename "$1" .toml)" \
    --rdzv-conf "is_host=$is_first,read_timeout=300,join_timeout=300" \
    -m megagap.train "$@"
