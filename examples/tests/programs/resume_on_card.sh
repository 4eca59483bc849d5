#!/usr/bin/env bash
# Exact resume on a card: kills a fine-tuning run at random moments, resumes it each time, and compares its adapter with that of a
# run that nobody interrupted.
#
#   FINETUNE=program MODEL=folder DATA=file WORK=folder resume_on_card.sh
#
# FINETUNE is built with --features cuda (DEVICE=cpu tries the script elsewhere). KILLS (10) times SIGKILL, then INTERRUPTS (3) times SIGINT, each 3 to 22 steps after the
# first step that follows the start. The uninterrupted run is made twice: whether two of them are equal says what can be asked of
# the third. Status 1 if the adapters differ.
set -euo pipefail

: "${FINETUNE:?program}" "${MODEL:?folder of a model}" "${DATA:?clue file}" "${WORK:?folder for runs}"
KILLS=${KILLS:-10}
INTERRUPTS=${INTERRUPTS:-3}
RANDOM=${SEED:-7}
mkdir -p "$WORK"

command=("$FINETUNE" --model "$MODEL" --data "$DATA" --device "${DEVICE:-cuda}" --preset notebook --quantization nf4-double --row-len 256 --batch 4
    --accumulate 1 --rank 16 --alpha 32 --targets all --dropout 0.1 --lr 1e-3 --steps "${STEPS:-300}" --evaluations 0 --eval-limit 20
    --save-every 10 --keep 3 --seed 0)

run() { # NAME [flags]: to the end
    local out=$WORK/$1
    shift
    "${command[@]}" --out "$out" "$@" >>"$out.log" 2>&1
}

steps() { # steps in the records of a run
    local found
    found=$(grep -c '"kind":"step"' "$WORK/interrupted/metrics.jsonl" 2>/dev/null) || true
    echo "${found:-0}"
}

interrupt() { # SIGNAL: starts the run or goes on with it, and ends it some steps later
    local before after pid
    before=$(steps)
    "${command[@]}" --out "$WORK/interrupted" --resume >>"$WORK/interrupted.log" 2>&1 &
    pid=$!
    after=$((3 + RANDOM % 20))
    # A resumed run first takes the steps since its checkpoint out of the records: what counts is that it has begun.
    while kill -0 $pid 2>/dev/null && ! { [ "$(steps)" -gt 0 ] && [ "$(steps)" -ne "$before" ]; }; do sleep 0.02; done
    local from
    from=$(steps)
    while kill -0 $pid 2>/dev/null && [ "$(($(steps) - from))" -lt $after ]; do sleep 0.01; done
    kill -"$1" $pid 2>/dev/null || { echo "the run ended before $1"; return; }
    wait $pid 2>/dev/null || true
    echo "$1 at step $(steps)"
}

sum() { sha256sum <"$WORK/$1/adapter/adapter_model.safetensors" | cut -c 1-16; }

run whole
run again
for _ in $(seq "$KILLS"); do interrupt KILL; done
for _ in $(seq "$INTERRUPTS"); do interrupt INT; done
run interrupted --resume
echo "whole $(sum whole), again $(sum again), interrupted $(sum interrupted): $(steps) steps"
[ "$(sum whole)" = "$(sum interrupted)" ]
