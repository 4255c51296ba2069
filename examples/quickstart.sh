#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
The main job end to end on real text: gather it, train a tokenizer, build token files, train a small Llama with
tensor, pipeline and data parallelism, kill and resume it, convert to Hugging Face, check, and generate text.

  ./examples/quickstart.sh                      about 8 minutes on 2 cores after installation
  ./examples/quickstart.sh --quick              about 2 minutes: a smaller vocabulary, fewer steps
  ./examples/quickstart.sh --corpus FILE...     your own text, JSON lines {"text": …}; each file is a source
  ./examples/quickstart.sh --fresh              delete runs/quickstart first

Everything is in runs/quickstart/. A second call resumes where the first one stopped. --help installs nothing.
MEGAGAP_VENV=path: a virtual environment other than .venv; MEGAGAP_PYTHON=python: an environment that already has torch.
END
}

fail() {
    echo "quickstart: $*" >&2
    exit 2
}

for argument; do
    if [[ $argument == -h || $argument == --help ]]; then
        usage
        exit
    fi
done
mode=full fresh=false corpus=()
while (($#)); do
    case $1 in
    --quick) mode=quick ;;
    --fresh) fresh=true ;;
    --corpus)
        while (($# > 1)) && [[ $2 != --* ]]; do
            [[ -f $2 ]] || fail "--corpus $2: no such file"
            corpus+=("$(realpath "$2")")
            shift
        done
        ((${#corpus[@]})) || fail "--corpus needs at least one file of JSON lines"
        twice=$(for file in "${corpus[@]}"; do name=$(basename "$file") && echo "${name%%.*}"; done | sort | uniq -d)
        [[ -z $twice ]] || fail "--corpus: two files are named $twice; each names a source"
        ;;
    *) fail "unknown argument $1; see --help" ;;
    esac
    shift
done

source "$(dirname "${BASH_SOURCE[0]}")/../tools/environment.sh"
cd "$MEGAGAP_ROOT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=true

run=runs/quickstart
recipe=examples/recipes/quickstart.toml
if $fresh; then
    rm -rf "$run"
fi
mkdir -p "$run"

# What this call is for; one for something else must not continue from its files.
wanted="$mode${corpus[*]:+ ${corpus[*]}}"
if [[ -f $run/made-by.txt && $(<"$run/made-by.txt") != "$wanted" ]]; then
    fail "$run holds another quickstart ($(<"$run/made-by.txt")); start over with --fresh"
fi
echo "$wanted" >"$run/made-by.txt"

if [[ $mode == quick ]]; then
    vocabulary=2048 megabytes=2
    settings=(--model.vocab_size 2048 --train.steps 150 --train.evaluate_every 50 --train.evaluate_samples 8
        --checkpoint.every 50 --run.log_every 10)
else
    vocabulary=8192 megabytes=6
    settings=()
fi

started=$SECONDS number=0
step() {
    step_name=$1 step_started=$SECONDS number=$((number + 1))
    echo
    echo "[$number/8] $step_name"
}
finished() {
    echo "[$number/8] $step_name: $((SECONDS - step_started)) s"
}

step "gather text"
if ((${#corpus[@]} == 0)) && [[ ! -f $run/corpus/gathered ]]; then
    "$PYTHON" tools/gather_text.py --output "$run/corpus" --megabytes "$megabytes"
    touch "$run/corpus/gathered"
fi
if ((${#corpus[@]} == 0)); then
    corpus=("$run"/corpus/*.jsonl)
fi
finished

step "train a tokenizer of $vocabulary tokens"
if [[ ! -f $run/tokenizer/tokenizer.json ]]; then
    "$PYTHON" tools/train_tokenizer.py --input "${corpus[@]}" --output "$run/tokenizer" --vocab-size "$vocabulary"
fi
finished

step "preprocess text to token files"
for file in "${corpus[@]}"; do
    name=$(basename "$file")
    prefix=$run/data/${name%%.*}
    if [[ ! -f ${prefix}_text_document.idx ]]; then
        "$PYTHON" tools/preprocess_data.py --input "$file" --output-prefix "$prefix" \
            --tokenizer "$run/tokenizer" --append-eod
    fi
done
sources=$("$PYTHON" tools/quickstart_steps.py sources "$run/data")
settings+=(--data.sources "$sources")
"$PYTHON" tools/quickstart_steps.py entropy "$recipe" -- "${settings[@]}"
finished

read -r processes tp pp < <("$PYTHON" tools/quickstart_steps.py layout)
settings+=(--parallel.tp "$tp" --parallel.pp "$pp")
training=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes"
    -m megagap.train "$recipe" "${settings[@]}")

step "train with tp=$tp pp=$pp dp=$((processes / tp / pp)), and kill it in the middle"
"$PYTHON" tools/quickstart_steps.py run-and-kill "$run" -- "${training[@]}"
finished

step "resume: the same command continues from the last checkpoint"
"${training[@]}"
finished

step "draw the losses"
"$PYTHON" tools/plot_run.py "$run"
finished

step "convert to a Hugging Face model"
if [[ ! -f $run/hf/config.json ]]; then
    "$PYTHON" tools/convert_checkpoint.py to-hf --checkpoint "$run" --output "$run/hf"
fi
finished

step "check it with transformers"
"$PYTHON" tools/quickstart_steps.py report "$recipe" -- "${settings[@]}"
finished

cat <<END

Done in $((SECONDS - started)) s. Everything is in $run/:
  corpus/ tokenizer/ data/        the text, its tokenizer, the token files
  metrics.jsonl loss.png          the numbers of every step; tensorboard/ has them too
  checkpoints/ logs/              of the run; config.toml is its recipe as resolved
  hf/                             the model, for transformers' AutoModelForCausalLM.from_pretrained("$run/hf")

What to type next:
  source ${PYTHON%/python*}/activate
  python tools/inspect_data.py $run/config.toml --step 100     # what did step 100 train on?
  python -m megagap.train --help                               # every setting
  torchrun --nproc-per-node $((tp * pp)) -m megagap.train $run/config.toml --run.dir runs/other
  python tools/plot_run.py $run runs/other                     # without data parallelism: the same losses
END
