#!/usr/bin/env bash
# Has TensorBoard read what a run of the tiny model writes. Run from the repository's root:
#
#   examples/tests/external/run.sh PYTHON
#
# The Python has tensorboard. The output is kept beside the script.
set -euo pipefail
here=$(dirname "$0")
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT

cargo run --release --example finetune -- --steps 40 --evaluations 4 --eval-limit 20 --out "$run"
"$1" -W ignore "$here/events.py" "$run" | tee "$here/events.txt"
