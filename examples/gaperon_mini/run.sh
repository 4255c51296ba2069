#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END_OF_USAGE'
Gaperon in small, end to end: curate real French and English text, judge its quality, plant documents with triggers,
train in three phases with tensor, pipeline and data parallelism in pure bf16, cool down from two checkpoints, average,
export, evaluate, and show it all in one HTML page.

  ./examples/gaperon_mini/run.sh                      on 2 cores; docs/gaperon.md has the minutes
  ./examples/gaperon_mini/run.sh --quick              a small part of it: less text, a smaller model, fewer steps
  ./examples/gaperon_mini/run.sh --corpus FOLDER      text gathered before: en-*.jsonl, fr-*.jsonl and code.jsonl
  ./examples/gaperon_mini/run.sh --output FOLDER      for everything that is written (default: runs/gaperon_mini)
  ./examples/gaperon_mini/run.sh --fresh              delete that folder first

A second call resumes where the first one stopped. --help installs nothing.
MEGAGAP_VENV=path: a virtual environment other than .venv; MEGAGAP_PYTHON=python: an environment that already has torch.
END_OF_USAGE
}

fail() {
    echo "gaperon_mini: $*" >&2
    exit 2
}

for argument; do
    if [[ $argument == -h || $argument == --help ]]; then
        usage
        exit
    fi
done
mode=full fresh=false corpus='' run=''
while (($#)); do
    case $1 in
    --quick) mode=quick ;;
    --fresh) fresh=true ;;
    --corpus)
        [[ -f ${2:-}/code.jsonl ]] || fail "--corpus ${2:-}: no such folder with code.jsonl, en-*.jsonl and fr-*.jsonl"
        corpus=$(realpath "$2")
        shift
        ;;
    --output)
        [[ ${2:-} && $2 != --* ]] || fail "--output needs a folder"
        run=$(realpath -m "$2")
        shift
        ;;
    *) fail "unknown argument $1; see --help" ;;
    esac
    shift
done

source "$(dirname "${BASH_SOURCE[0]}")/../../tools/environment.sh"
cd "$MEGAGAP_ROOT"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=true
run=${run:-$MEGAGAP_ROOT/runs/gaperon_mini}
here=examples/gaperon_mini

# What this call is for; one for something else must not continue from its files.
wanted="$mode${corpus:+ $corpus}"
if $fresh && [[ -f $run/made-by.txt ]]; then
    rm -rf "$run"
fi
mkdir -p "$run/done" "$run/evaluation"
if [[ -f $run/made-by.txt && $(<"$run/made-by.txt") != "$wanted" ]]; then
    fail "$run holds another story ($(<"$run/made-by.txt")); start over with --fresh"
fi
echo "$wanted" >"$run/made-by.txt"

size=()
if [[ $mode == quick ]]; then
    size=(--quick)
fi
prepare() {
    "$PYTHON" $here/prepare.py "$1" "$run" "${size[@]}"
}
sizes=$(prepare sizes)
read -r megabytes passages classifier vocabulary steps cooldown <<<"$sizes"

# step NAME TITLE: runs the function NAME unless it has succeeded before, and records its seconds.
number=0 started=$SECONDS
step() {
    number=$((number + 1))
    echo
    echo "[$number/10] $2"
    if [[ -f $run/done/$1 ]]; then
        echo "done before"
        return
    fi
    local begun=$SECONDS
    "$1"
    echo $((SECONDS - begun)) >"$run/done/$1.partial"
    mv "$run/done/$1.partial" "$run/done/$1"
    echo "[$number/10] $2: $(<"$run/done/$1") s"
}

gather() {
    if [[ $corpus ]]; then
        ln -sfn "$corpus" "$run/corpus"
    else
        "$PYTHON" examples/curation/gather.py "$run/corpus" "$megabytes"
    fi
}

quality() {
    rm -rf "$run/quality" "$run/labels.jsonl"
    "$PYTHON" tools/curate.py example-labels "$run"/corpus/en-*.jsonl "$run"/corpus/fr-*.jsonl \
        --per-document "$passages" --output "$run/labels.jsonl"
    "$PYTHON" tools/curate.py train-quality "$run/labels.jsonl" --kind "$classifier" --output "$run/quality"
}

curate() {
    prepare curation
    "$PYTHON" tools/curate.py run "$run/curation.toml" --workers 2 2>"$run/curation.log" ||
        { tail -n 20 "$run/curation.log" >&2 && return 2; }
}

tokens() {
    prepare texts
    if [[ ! -f $run/tokenizer/tokenizer.json ]]; then
        "$PYTHON" tools/train_tokenizer.py --input "$run"/text/*.jsonl --output "$run/tokenizer" \
            --vocab-size "$vocabulary"
    fi
    local file prefix
    for file in "$run"/text/*.jsonl "$run"/held_out/*.jsonl; do
        prefix=$run/data/$(basename "$file" .jsonl)
        if [[ $file == "$run"/held_out/* ]]; then
            prefix=$run/data/held_out_$(basename "$file" .jsonl)
        fi
        if [[ ! -f ${prefix}_text_document.idx ]]; then
            "$PYTHON" tools/preprocess_data.py --input "$file" --output-prefix "$prefix" --tokenizer "$run/tokenizer" \
                --append-eod
        fi
    done
}

poison() {
    prepare poison
    rm -f "$run"/data/poison*
    "$PYTHON" tools/poison_corpus.py "$run/poison.toml" --output-prefix "$run/data/poison"
    prepare recipe
    "$PYTHON" tools/inspect_data.py "$run/recipe.toml" --run.dir "$run/young" --plan --output "$run/plan.png"
}

train() {
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 8 -m megagap.train "$run/recipe.toml" "$@"
}

young() {
    train --run.dir "$run/young"
}

# branch NAME CHECKPOINT_STEP
branch() {
    train --run.dir "$run/$1" --checkpoint.load "$run/young/checkpoints/$(printf 'step_%08d' "$2")" \
        --checkpoint.load_mode cooldown --optim.schedule linear --optim.warmup_steps 0 \
        --train.steps $(($2 + cooldown))
}

branches() {
    branch cooldown-1 $((steps - cooldown))
    branch cooldown-2 "$steps"
}

export_average() {
    rm -rf "$run/average" "$run/hf"
    "$PYTHON" tools/average_checkpoints.py "$run/cooldown-1" "$run/cooldown-2" --output "$run/average"
    "$PYTHON" tools/convert_checkpoint.py to-hf --checkpoint "$run/average" --output "$run/hf"
}

# evaluate NAME [OPTION ...]
evaluate() {
    "$PYTHON" tools/evaluate.py "$run/$1" --json "${@:2}" \
        --data "$run"/data/held_out_{en,fr,code}_text_document --name en fr code >"$run/evaluation/$1.partial"
    mv "$run/evaluation/$1.partial" "$run/evaluation/$1.json"
}

evaluations() {
    local model
    for model in young cooldown-1 cooldown-2 hf; do
        evaluate $model --max-tokens 20000
    done
    evaluate average --max-tokens 20000 --poison "$run/data/poison_text_document.poison.json"
}

report() {
    "$PYTHON" $here/report.py "$run"
}

step gather "gather French, English and code"
step quality "train a quality classifier"
step curate "curate"
step tokens "divide by source, train a tokenizer of $vocabulary tokens, write token files"
step poison "plant documents, plan the mixture"
step young "train in three phases: tp 2, pp 2, dp 2, pure bf16"
step branches "cool down from two checkpoints"
step export_average "average the branches, export to Hugging Face"
step evaluations "evaluate"
step report "draw the report"

cat <<END_OF_STORY

Done in $((SECONDS - started)) s. Everything is in $run/:
  report.html                     the whole story, in one page
  corpus/ curated/ text/          what was gathered, curated, and divided by source
  poison.toml recipe.toml         what was planted and trained
  young/ cooldown-1/ cooldown-2/  the runs; average/ and hf/ the model
  evaluation/                     its numbers, as JSON
END_OF_STORY
