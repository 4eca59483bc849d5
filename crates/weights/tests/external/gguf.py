"""Our GGUF files in llama.cpp: tokens of the golden prompts, and 16 greedy tokens after each, against ours.

usage: gguf.py OUR_DIR GOLDEN_DIR TOKENIZER_DIR

The last directory holds texts with the tokens that Llama 2's tokenizer has for them. Exit status 1 if prompts are cut differently, or an F16 file's continuations are equal for fewer than 7 of 8 prompts.
"""
import importlib.metadata
import itertools
import json
import sys

from llama_cpp import Llama

ours, golden, tokenizer = sys.argv[1:4]
continuations = json.load(open(f"{ours}/continuations.json"))
prompts = json.load(open(f"{golden}/greedy_base.json"))
failed = 0
print("llama-cpp-python", importlib.metadata.version("llama-cpp-python"))
for name, expected in continuations.items():
    model = Llama(f"{ours}/{name}/model.gguf", n_ctx=256, verbose=False, n_threads=1, seed=0)
    cut = sum(model.tokenize(p["prompt"].encode(), add_bos=True, special=False) == p["input_ids"] for p in prompts)
    equal, first = 0, []
    for prompt, tokens in zip(prompts, expected):
        model.reset()
        greedy = model.generate(prompt["input_ids"], temp=0.0, top_k=1, repeat_penalty=1.0)
        found = list(itertools.islice(greedy, len(tokens)))
        equal += found == tokens
        first.append(next((i for i, (a, b) in enumerate(zip(found, tokens)) if a != b), len(tokens)))
    over = ""
    if cut < len(prompts) or ("f16" in name and equal < 7):
        over = "  FAILED"
        failed += 1
    print(f"{name:<20} prompts cut alike {cut}/{len(prompts)}  16 greedy tokens alike {equal}/{len(prompts)}  equal tokens at the start {first}{over}")
model = Llama(f"{ours}/llama2-vocabulary/model.gguf", vocab_only=True, verbose=False)
texts = [json.loads(line) for line in open(f"{tokenizer}/golden_prompts_499.jsonl")]
cut = sum(model.tokenize(text["text"].encode(), add_bos=True, special=False) == text["ids"] for text in texts)
failed += cut < len(texts)
print(f"Llama 2's vocabulary  texts cut alike {cut}/{len(texts)}")
print("failed" if failed else "all passed")
sys.exit(bool(failed))
