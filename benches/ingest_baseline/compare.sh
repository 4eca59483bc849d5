#!/usr/bin/env bash
# Runs Buzzer's ingestion and the Python baseline on the same file, in turn, and prints both.
#
#   benches/ingest_baseline/compare.sh [DATA] [TOKENIZER] [TIMES]
#
# Each side runs TIMES times (default 3) in a process of its own, one after the other in turn, so that a busy minute of the machine
# hits both; the fastest run of each is compared, and the largest peak of memory. Python is timed after its imports.
# The baseline packs in the way that is faster for it: TRL's default batches of 1,000 documents or all in one batch.
# Needs python3 and network access the first time: pandas, pyarrow, tokenizers, datasets, transformers and trl are
# installed into .venv (git-ignored). trl goes in without its dependencies: they would pull torch (gigabytes, CUDA),
# which neither `trl.data_utils` nor this comparison uses. Raw results are kept under benches/runs/.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
data=$(realpath "${1:-$root/../shared/data/jeopardy_216930.csv}")
tokenizer=$(realpath "${2:-$root/../shared/tokenizer/llama2/tokenizer.json}")
times=${3:-3}
cd "$root"

python=.venv/bin/python
[ -x "$python" ] || python3 -m venv .venv
if ! "$python" -c 'import trl.data_utils, pandas' 2>/dev/null; then
    "$python" -m pip install --quiet pandas pyarrow tokenizers datasets transformers
    "$python" -m pip install --quiet --no-deps trl
fi

cargo bench --quiet --workspace --bench ingest --no-run
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for run in $(seq "$times"); do
    echo "run $run of $times (load $(cut -d' ' -f1-3 /proc/loadavg))"
    cargo bench --quiet --workspace --bench ingest -- \
        --data "$data" --tokenizer "$tokenizer" --json "$scratch/buzzer-$run.json" >/dev/null
    for batch in 1000 all; do
        "$python" benches/ingest_baseline/baseline.py --data "$data" --tokenizer "$tokenizer" \
            --pack-batch "$batch" --json "$scratch/python-$batch-$run.json" >/dev/null 2>&1
    done
done
mkdir -p benches/runs
"$python" benches/ingest_baseline/summary.py "$scratch" "benches/runs/ingest-$(date -u +%Y-%m-%d)-$(uname -n).json"
