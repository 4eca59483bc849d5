#!/usr/bin/env bash
# Holds what this crate writes against PEFT, transformers, bitsandbytes and llama.cpp. Run from the repository's root:
#
#   crates/weights/tests/external/run.sh PYTHON PYTHON_WITH_LLAMA_CPP
#
# The first Python has torch, transformers, peft, bitsandbytes, accelerate and safetensors, the second llama-cpp-python built
# for the processor. Needs ../shared/golden/small and ../shared/tokenizer. The outputs are kept beside the scripts.
set -euo pipefail
here=$(dirname "$0")
export BUZZER_EXTERNAL_DIR=${BUZZER_EXTERNAL_DIR:-$(mktemp -d)}
golden=../shared/golden/small

cargo test --release --workspace --features cuda,wgpu --test weights -- --ignored files_for_other_libraries
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$1" -W ignore "$here/hugging_face.py" "$BUZZER_EXTERNAL_DIR" "$golden" | tee "$here/hugging_face.txt"
"$2" "$here/gguf.py" "$BUZZER_EXTERNAL_DIR" "$golden" ../shared/tokenizer 2>/dev/null | tee "$here/gguf.txt"
