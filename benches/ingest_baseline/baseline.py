"""The same way from a clue file to packed rows in Python: pandas, Hugging Face tokenizers, TRL's best-fit packing.

Written as a competent user would, for speed: vectorised pandas with Arrow-backed strings, `encode_batch_fast` on all
cores over whole columns, TRL's `pack_dataset` on Arrow columns. Where the two programs could differ, this one does the
smaller work:

- the texts are encoded once; the loss mask on answers, which costs TRL a second encoding of the prompt, is left out;
- only ids and `seq_lengths` are made; Buzzer also makes positions, document numbers and labels;
- packing uses the faster of two ways, chosen by --pack-batch: TRL's default, batches of 1,000 documents (rows at the
  end of each batch stay open, so it packs less tightly), or `all`, one batch, which fills rows as Buzzer does.

torch is not needed: `trl.data_utils` imports without it. Time starts after the imports.
"""

import argparse
import html
import itertools
import json
import re
import resource
import time
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa

warnings.filterwarnings("ignore")

from datasets import Dataset, disable_progress_bars  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402
from trl.data_utils import pack_dataset  # noqa: E402

DIRECTIONS = "audio|video|filler|seen here|heard here|shown here|pictured here|clue missing|monitor"
NOTHING = ["", "null", "NULL", "\\N"]


def read(path, limit):
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", nrows=limit, engine="c")
    table.columns = table.columns.str.strip().str.lower()
    return table


def visible(column):
    """Text without tags, entities, stray backslashes and odd spaces, whole column at a time."""
    column = column.str.replace(r"<(?:br|p|div|li|tr|td)\b[^>]*>", " ", regex=True, flags=re.I)
    column = column.str.replace(r"</?[a-zA-Z!][^>]*>", "", regex=True)
    entities = column.str.contains("&", regex=False)
    column = column.mask(entities, column[entities].map(html.unescape))
    column = column.str.replace("\\'", "'", regex=False).str.replace('\\"', '"', regex=False)
    return column.str.replace(r"\s+", " ", regex=True).str.strip()


def outside_brackets(column):
    return column.str.replace(r"[(\[][^)\]]*[)\]]", "", regex=True)


def clean(table):
    """The same rules and the same order of reasons as Buzzer's `clean`."""
    raw, answers = table["question"], table["answer"]
    question, answer = visible(raw), visible(answers)
    says = outside_brackets(question).str.contains(r"\w", regex=True)
    linked = raw.str.contains(r"<a\b", regex=True, flags=re.I)
    outside = visible(raw[linked].str.replace(r"<a\b[^>]*>.*?</a>", " ", regex=True, flags=re.I | re.S))
    silent_outside = ~outside_brackets(outside).str.contains(r"\w", regex=True)
    short = outside_brackets(question[linked]).str.split().str.len() < 6
    media = pd.Series(False, index=table.index)
    media[linked] = silent_outside & short
    direction = question.str.contains(DIRECTIONS, case=False, regex=True)
    bracketed = question.str.contains(r"[(\[]", regex=True)
    media |= ~linked & bracketed & ~says & direction
    no_question = raw.str.strip().isin(NOTHING) | (question == "")
    no_answer = answers.str.strip().isin(NOTHING) | (answer == "")
    date = pd.to_datetime(table["air date"], errors="coerce", format="mixed")
    kept = pd.DataFrame({"question": question, "answer": answer, "date": date, "category": table["category"]})
    kept = kept[~(media | no_question | no_answer)]
    return kept.drop_duplicates(["question", "answer"])


def split(clues, fraction):
    """By a hash of the question, so that a clue stays on its side."""
    key = clues["question"].str.lower()
    unit = pd.util.hash_array(key.to_numpy(dtype=object)) / 2.0**64
    return clues[unit >= fraction], clues[unit < fraction]


def load_tokenizer(path):
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    begin, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    return tokenizer


def tokenize(tokenizer, clues):
    texts = "### Question: " + clues["question"] + "\n ### Answer: " + clues["answer"]
    encodings = tokenizer.encode_batch_fast(texts.tolist())
    ids = [encoding.ids for encoding in encodings]
    lengths = np.fromiter(map(len, ids), dtype=np.int32, count=len(ids))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int32, count=offsets[-1])
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
    return Dataset(pa.table({"input_ids": column}))


def pack(dataset, row_len, batch):
    batch_size = len(dataset) if batch == "all" else int(batch)
    return pack_dataset(dataset, row_len, "bfd", map_kwargs={"batch_size": batch_size})


def measure(arguments):
    seconds, begin = {}, time.perf_counter()
    last = begin

    def lap(name):
        nonlocal last
        now = time.perf_counter()
        seconds[name], last = now - last, now

    tokenizer = load_tokenizer(arguments.tokenizer)
    lap("load tokenizer")
    table = read(arguments.data, arguments.limit)
    lap("read")
    clues = clean(table)
    lap("clean")
    sides = split(clues, arguments.eval_fraction)
    lap("split")
    datasets = [tokenize(tokenizer, side) for side in sides]
    lap("tokenize")
    packed = [pack(dataset, arguments.row_len, arguments.pack_batch) for dataset in datasets]
    lap("pack")
    seconds["total"] = last - begin
    lengths = [pa.compute.sum(pa.compute.list_value_length(p.data.column("input_ids"))).as_py() for p in packed]
    counts = {
        "rows_read": len(table),
        "rows_kept": len(clues),
        "tokens": sum(lengths),
        "packing_efficiency": lengths[0] / (len(packed[0]) * arguments.row_len),
    }
    return seconds, counts


def peak_memory_bytes():
    try:
        status = open("/proc/self/status", encoding="ascii").read()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--row-len", type=int, default=1024)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--eval-fraction", type=float, default=0.05)
    parser.add_argument("--pack-batch", default="all", help="documents that TRL packs at a time, or all (default)")
    arguments = parser.parse_args()
    disable_progress_bars()
    seconds, counts = measure(arguments)
    peak = peak_memory_bytes()
    rows = [
        {
            "name": f"ingest_baseline.{name.replace(' ', '_')}",
            "device": "cpu",
            "shape": f"{counts['rows_read']} rows, row length {arguments.row_len}, pack batch {arguments.pack_batch}",
            "value": value,
            "unit": "s" if name in seconds else "",
            "peak_memory_bytes": peak,
            "dtype": "u32",
            "commit": f"pandas {pd.__version__}",
        }
        for name, value in {**seconds, **counts}.items()
    ]
    for row in rows:
        print(f"{row['name']:<36} {row['value']:>14.3f} {row['unit']}")
    print(f"{'peak host memory':<36} {peak / 2**30:>14.3f} GiB")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as out:
            json.dump(rows, out, indent=1)
            out.write("\n")


main()
