"""A small tokenizer.model of Llama 2's kind, and the ids that sentencepiece gives with it.

usage: python generate.py      (sentencepiece)

Trained on this project's own text, with the settings that Llama 2's file names.
"""

import io
import json
from pathlib import Path

import sentencepiece as spm

HERE = Path(__file__).parent
CORPUS = (HERE.parent / "corpus.txt").read_text(encoding="utf-8")


def train(**changes):
    settings = dict(
        model_type="bpe", vocab_size=420, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=True, allow_whitespace_only_pieces=True, split_digits=True,
        character_coverage=1.0, minloglevel=2, num_threads=1,
    )
    model = io.BytesIO()
    lines = iter(CORPUS.splitlines())
    spm.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **(settings | changes))
    return model.getvalue()


model = train()
(HERE / "tokenizer.model").write_bytes(model)
(HERE / "unigram.model").write_bytes(train(model_type="unigram", vocab_size=310))
(HERE / "user-defined.model").write_bytes(train(user_defined_symbols=["[INST]"], vocab_size=330))
processor = spm.SentencePieceProcessor(model_proto=model)
texts = [
    "", " ", "   ", "a", " a", "a  b", "a ", "▁", "a▁b", "<s>", "x<s>y</s>", "<0x41>", "\n", "\r\n\t", "é e\u0301 ß Ж 中文",
    "😀 👩\u200d🚀", "\u0000\u00a0\ufeff", "### Question: ", "1984 $2,000", "aaaaaaaaaaaaaaaaaaaa", "      \n      ",
] + CORPUS.splitlines()[:60]
ids = [{"text": text, "ids": processor.encode(text)} for text in texts]
lines = [json.dumps(row, ensure_ascii=False) for row in ids]
(HERE / "ids.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
(HERE / "version.txt").write_text(f"sentencepiece {spm.__version__}\n")
