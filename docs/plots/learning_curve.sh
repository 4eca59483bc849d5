#!/usr/bin/env bash
# A learning curve on real clues, on one NVIDIA card. No cargo, no network, no python needed.
#
#   export BIN=folder CLUES=jeopardy_216930.csv OUT=folder
#   learning_curve.sh base     # part 1: the base, from nothing
#   learning_curve.sh runs     # part 2: the base judged and, beside it, all runs at the same time
#   learning_curve.sh judge    # part 3: the runs judged, each compared with those before it
#   learning_curve.sh steps    # part 4: the checkpoints of one run, judged at the same time: the curve over steps
#   learning_curve.sh write    # part 5: a writer of clues, its style
#
# BIN holds make_base, finetune and evaluate, built with --features cuda. Weights stay in WORK (/tmp/curve), which has to live from
# part 1 to part 2 (on another machine: carry $WORK/base over, about 70 MB); reports, records, plots
# and answers (with the clues: not for a repository) are copied to OUT. A part ends by
# itself after PART_SECONDS (540), with status 3 if stages are left; started again it does what is left (a fine-tuning run goes on
# where it was, the base begins anew).
#
# Measured on an H200: a step of the base, 16,384 tokens, takes 119 ms; base 223 s with STEPS=1600, runs 79 s, then judge, steps and write at the same time
# 96 s. STEPS=1600 takes so many steps and leaves out the two short runs that find the time of one.
#
# What can be turned (environment): STEPS (of the base), BASE_SECONDS (for the steps of the base, 360), EPOCHS (of the base at most, 8), RUN_EPOCHS (1),
# VARIANTS, JUDGED (4000), WRITTEN (1000), DEVICE (cuda), and for a trial on a processor the sizes below.
set -euo pipefail

part=${1:?base, runs, judge, steps or write}
: "${BIN:?folder of make_base, finetune, evaluate}" "${CLUES:?the clue file}" "${OUT:?folder for reports}"
WORK=${WORK:-/tmp/curve}
DEVICE=${DEVICE:-cuda}
FROM=${FROM:-2011-01-01}
JUDGED=${JUDGED:-4000}
WRITTEN=${WRITTEN:-1000}
SAVE_STEPS=${SAVE_STEPS:-100}
BASE_SECONDS=${BASE_SECONDS:-360}
EPOCHS=${EPOCHS:-8}
RUN_EPOCHS=${RUN_EPOCHS:-1}
RUN_LR=${RUN_LR:-1e-3}
VARIANTS=${VARIANTS:-isolated-answers isolated-all wrapped-answers wrapped-all}
VOCAB=${VOCAB:-8192} HIDDEN=${HIDDEN:-512} MLP=${MLP:-1408} LAYERS=${LAYERS:-8} HEADS=${HEADS:-8}
ROW=${ROW:-512} BASE_ROWS=${BASE_ROWS:-32} RUN_ROWS=${RUN_ROWS:-16} RANK=${RANK:-32} ALPHA=${ALPHA:-64}
PROBE=${PROBE:-20 80}
PART_SECONDS=${PART_SECONDS:-540}
results=$WORK/results
base=$WORK/base
mkdir -p "$results" "$OUT"
# OUT may be another, empty folder in every call.
trap 'cp -r "$results/." "$OUT/"' EXIT

is_done() { # a report of a run that was not interrupted
    [ -f "$1" ] && ! grep -q '"interrupted": *true' "$1"
}

# Runs a program unless its report is there; its output goes to NAME.log, its duration to times.txt.
stage() {
    local name=$1 report=$2
    shift 2
    if is_done "$report"; then
        echo "== $name: done before"
        return
    fi
    local start=$SECONDS
    echo "== $name (at $start s): $*"
    # An interrupted run of finetune saves what there is.
    timeout --signal=INT --kill-after=20 $((PART_SECONDS > start ? PART_SECONDS - start : 1)) "$@" >"$results/$name.log" 2>&1 || echo "ended with status $?"
    tail -n 25 "$results/$name.log"
    if ! is_done "$report"; then
        echo "$name: not done after $((SECONDS - start)) s; see $name.log, or start this part again" | tee -a "$results/times.txt"
        exit 3
    fi
    echo "$name $((SECONDS - start)) s" | tee -a "$results/times.txt"
}

number() { # the first number of a key in a JSON file
    grep -o "\"$1\": *[-+0-9.eE]*" "$2" | head -n 1 | sed 's/.*: *//'
}

# Clues are concatenated here, as texts are where models are made: the base is neutral about isolation then.
make_base=("$BIN/make_base" --clues --data "$CLUES" --device "$DEVICE" --packing wrapped --row-len "$ROW" --batch "$BASE_ROWS"
    --vocab "$VOCAB" --hidden "$HIDDEN" --intermediate "$MLP" --layers "$LAYERS" --heads "$HEADS" --lr 1e-3 --weight-decay 0.1
    --seed 0)

# The flags that all fine-tuning runs share.
tune=("$BIN/finetune" --resume --model "$base" --data "$CLUES" --eval-from "$FROM" --device "$DEVICE" --preset notebook
    --quantization nf4-double --row-len "$ROW" --batch "$RUN_ROWS" --accumulate 1 --rank "$RANK" --alpha "$ALPHA" --targets all
    --dropout 0.0 --lr "$RUN_LR" --schedule cosine --warmup 0.03 --weight-decay 0.0 --max-grad-norm 1.0 --optimizer adamw
    --epochs "$RUN_EPOCHS" --seed 0 --evaluations 8 --save-every "$SAVE_STEPS" --keep 20)

judge=("$BIN/evaluate" --model "$base" --data "$CLUES" --eval-from "$FROM" --device "$DEVICE" --quantization nf4-double --answer-batch 256)
answers=("${judge[@]}" --template question --max-new-tokens 24 --eval-limit "$JUDGED")

# A run and its records.
fine_tune() {
    local variant=$1 run=$WORK/$1
    stage "run-$variant" "$run/report.json" "${tune[@]}" --out "$run" --eval-limit 300 --template question \
        --packing "${variant%-*}" --loss-on "${variant#*-}"
    mkdir -p "$results/$variant"
    cp "$run/report.json" "$run/metrics.jsonl" "$run/training.svg" "$run/recipe.toml" "$results/$variant/"
    # MFU stands in the records of every step where the card's rate is known: all that crates/kernels/src/card.rs names, not in f32.
    echo "$variant: $(grep -c '"kind":"step"' "$run/metrics.jsonl") steps, $(grep -c '"mfu":' "$run/metrics.jsonl") with MFU;" \
        "$(grep '"mfu":' "$run/metrics.jsonl" | tail -n 1 | grep -o '"mfu":[^,]*' || echo 'no MFU')" | tee -a "$results/times.txt"
    if [ "$DEVICE" != cpu ] && grep '"kind":"step"' "$run/metrics.jsonl" | grep -qv '"mfu":'; then
        echo "CHECK FAILED: steps of $variant without MFU" | tee -a "$results/times.txt"
    fi
}

# Waits for stages in the background; status 3 if one is left to do.
wait_for() {
    local job left=0
    for job in "$@"; do
        wait "$job" || left=3
    done
    [ "$left" = 0 ] || exit "$left"
}

case $part in
base)
    [ "$DEVICE" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$results/card.txt"
    steps=${STEPS:-}
    if [ -z "$steps" ]; then
        # Two short runs of few clues: the difference is the time of a step, without kernels being compiled.
        read -r few many <<<"$PROBE"
        for steps in $few $many; do
            stage "probe-$steps" "$WORK/probe-$steps/report.json" "${make_base[@]}" --limit 20000 --eval-fraction 0.05 --steps "$steps" --epochs 1000 \
                --evaluations 0 --out "$WORK/probe-$steps" --records "$WORK/probe-$steps-records"
        done
        a=$(number seconds "$WORK/probe-$few/report.json") b=$(number seconds "$WORK/probe-$many/report.json")
        steps=$(awk -v a="$a" -v b="$b" -v n=$((many - few)) -v all="$BASE_SECONDS" 'BEGIN { printf "%d", all / ((b - a) / n) }')
        echo "a step of the base takes $(awk -v a="$a" -v b="$b" -v n=$((many - few)) 'BEGIN { printf "%.1f ms", 1000 * (b - a) / n }'): at most $steps steps and $EPOCHS epochs" | tee -a "$results/times.txt"
    fi
    stage base "$base/report.json" "${make_base[@]}" --eval-from "$FROM" --eval-limit 2000 --epochs "$EPOCHS" --steps "$steps" --evaluations 8 \
        --out "$base" --records "$results/base"
    cp "$base/report.json" "$base/config.json" "$results/base/"
    ;;
runs)
    jobs=()
    stage judge-before "$results/before/report.json" "${answers[@]}" --out "$results/before" &
    jobs+=($!)
    for variant in $VARIANTS; do
        fine_tune "$variant" &
        jobs+=($!)
    done
    wait_for "${jobs[@]}"
    ;;
judge)
    compare=(--compare "$results/before")
    for variant in $VARIANTS; do
        stage "judge-$variant" "$results/$variant-judged/report.json" "${answers[@]}" --adapter "$WORK/$variant/adapter" "${compare[@]}" \
            --out "$results/$variant-judged"
        compare+=(--compare "$results/$variant-judged")
    done
    ;;
steps)
    # Measurements of the held-out loss leave checkpoints as well: of those that are near each other only one is judged. The last is the run's.
    jobs=() judged_step=0
    for checkpoint in "$WORK"/isolated-answers/checkpoints/step-*; do
        step=${checkpoint##*/}
        number=$((10#${step#step-}))
        [ $((number - judged_step)) -ge $((SAVE_STEPS * 6 / 10)) ] || continue
        judged_step=$number
        stage "judge-$step" "$results/steps/$step/report.json" "${answers[@]}" --adapter "$checkpoint" --by round --out "$results/steps/$step" &
        jobs+=($!)
    done
    wait_for "${jobs[@]}"
    ;;
write)
    run=$WORK/writer
    clues=("${judge[@]}" --template clue --eval-limit "$WRITTEN")
    stage write-before "$results/written-before/report.json" "${clues[@]}" --out "$results/written-before" &
    before=$!
    stage run-writer "$run/report.json" "${tune[@]}" --out "$run" --eval-limit 100 --template clue --packing isolated --loss-on answers
    mkdir -p "$results/writer"
    cp "$run/report.json" "$run/metrics.jsonl" "$run/training.svg" "$run/recipe.toml" "$results/writer/"
    stage write-after "$results/written/report.json" "${clues[@]}" --adapter "$run/adapter" --out "$results/written"
    wait_for "$before"
    ;;
*)
    echo "part $part: choose base, runs, judge, steps or write" >&2
    exit 2
    ;;
esac
echo "part $part done in $SECONDS s" | tee -a "$results/times.txt"
