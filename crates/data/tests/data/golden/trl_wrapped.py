"""Rows that TRL 0.4.7 makes of invented token lists, for the test `packing::wrapped_rows_are_those_of_trl_0_4_7`.

    pip download --no-deps trl==0.4.7 && unzip trl-0.4.7-py3-none-any.whl
    python trl_wrapped.py trl/trainer/utils.py > trl_wrapped.json

It runs the class `ConstantLengthDataset` of that file as it is, with stand-ins for the two names it takes from torch, so
that no torch is needed. Its shuffle of whole rows is off: Buzzer shuffles rows when it trains, not when it packs.
"""

import ast
import json
import random
import sys
import types
import warnings

BOS, EOS = 1, 2


class Tokenizer:
    eos_token_id = EOS

    def __call__(self, texts, truncation):
        assert not truncation
        return {"input_ids": [[BOS] + [int(word) for word in text.split()] for text in texts]}


def constant_length_dataset(path):
    source = open(path, encoding="utf-8").read()
    wanted = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "ConstantLengthDataset")
    torch = types.SimpleNamespace(LongTensor=list)
    names = {"IterableDataset": object, "torch": torch, "random": random, "warnings": warnings}
    exec(compile(ast.Module([wanted], []), path, "exec"), names)
    return names["ConstantLengthDataset"]


def case(dataset_class, documents, row_len):
    texts = [{"text": " ".join(map(str, document))} for document in documents]
    rows = dataset_class(
        Tokenizer(), texts, dataset_text_field="text", seq_length=row_len, eos_token_id=EOS, shuffle=False
    )
    rows = list(rows)
    assert all(row["input_ids"] == row["labels"] for row in rows)
    return {
        "row_len": row_len,
        "documents": [[BOS] + document + [EOS] for document in documents],
        "rows": [row["input_ids"] for row in rows],
    }


def main():
    dataset_class = constant_length_dataset(sys.argv[1])
    generator = random.Random(47)
    cases = []
    for count, longest, row_len in [(0, 1, 8), (1, 3, 8), (3, 4, 64), (25, 9, 16), (40, 30, 32), (9, 50, 10), (6, 6, 8)]:
        length = lambda: longest if (count, longest) == (6, 6) else generator.randint(1, longest)
        documents = [[generator.randint(3, 999) for _ in range(length())] for _ in range(count)]
        cases.append(case(dataset_class, documents, row_len))
    print(json.dumps(cases, separators=(",", ":")))


main()
