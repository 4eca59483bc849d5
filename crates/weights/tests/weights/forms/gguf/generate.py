"""Writes model.gguf with llama.cpp's own package, for the reader and as the seed of its fuzzing.

    pip install gguf==0.19.0 && python generate.py

A model of one block with 4 heads over 2 of keys, 32 wide, in every type that is read here. Values are whole eighths from -1 to
+1, so that F16 holds them exactly.
"""
import pathlib

import gguf
import numpy as np

HIDDEN, MLP, VOCABULARY, HEADS, KEYS = 32, 64, 12, 4, 2
F32, F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
Q8, Q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
KEY_ROWS = HIDDEN // HEADS * KEYS


def values(rows, columns):
    places = np.arange(rows * columns, dtype=np.int64)
    return ((places * 7 % 17 - 8) / 8).astype(np.float32).reshape(rows, columns)


writer = gguf.GGUFWriter(pathlib.Path(__file__).with_name("model.gguf"), "llama")
writer.add_name("a form")
writer.add_context_length(128)
writer.add_embedding_length(HIDDEN)
writer.add_block_count(1)
writer.add_feed_forward_length(MLP)
writer.add_head_count(HEADS)
writer.add_head_count_kv(KEYS)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_freq_base(10000.0)
writer.add_rope_dimension_count(HIDDEN // HEADS)
writer.add_tokenizer_model("llama")
writer.add_token_list([f"<{token}>" for token in range(VOCABULARY)])
writer.add_token_scores([-float(token) for token in range(VOCABULARY)])
writer.add_token_types([1] * VOCABULARY)
writer.add_add_bos_token(True)
for name, rows, columns, kind in [
    ("token_embd", VOCABULARY, HIDDEN, Q8),
    ("blk.0.attn_norm", 1, HIDDEN, F32),
    ("blk.0.attn_q", HIDDEN, HIDDEN, Q4),
    ("blk.0.attn_k", KEY_ROWS, HIDDEN, Q8),
    ("blk.0.attn_v", KEY_ROWS, HIDDEN, F16),
    ("blk.0.attn_output", HIDDEN, HIDDEN, F32),
    ("blk.0.ffn_norm", 1, HIDDEN, F32),
    ("blk.0.ffn_gate", MLP, HIDDEN, Q4),
    ("blk.0.ffn_up", MLP, HIDDEN, Q8),
    ("blk.0.ffn_down", HIDDEN, MLP, F16),
    ("output_norm", 1, HIDDEN, F32),
    ("output", VOCABULARY, HIDDEN, F16),
]:
    data = values(rows, columns)
    data = data[0] if rows == 1 else data
    if kind in (Q8, Q4):
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(data, kind), raw_dtype=kind)
    else:
        writer.add_tensor(f"{name}.weight", data.astype(np.float16 if kind == F16 else np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
