# SPDX-License-Identifier: Apache-2.0
"""Makes tests/peers/rope.json: what transformers computes for rotary positions of every type that is built.

A list of cases: the config.json, the positions looked at, and cosine and sine of every pair of elements at each of
them, as LlamaRotaryEmbedding gives them in fp32 (17 digits would be more than they have; 9 read back to the same bits).

usage: make_rope.py OUT.json
"""
import json
import sys

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SHAPE = dict(model_type="llama", vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
             num_attention_heads=2, head_dim=16)
CASES = [
    (dict(max_position_embeddings=4096), 4096),
    (dict(max_position_embeddings=131072, rope_theta=500000.0, head_dim=32), 131072),
    (dict(max_position_embeddings=4096, rope_scaling={"type": "linear", "factor": 2.5}), 4096),
    (dict(max_position_embeddings=1024, rope_theta=10000.0, rope_scaling={"rope_type": "dynamic", "factor": 4.0}), 1024),
    (dict(max_position_embeddings=1024, rope_scaling={"rope_type": "dynamic", "factor": 4.0}), 3000),
    (dict(max_position_embeddings=131072, rope_theta=500000.0, head_dim=64,
          rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 8192}), 131072),
    (dict(max_position_embeddings=4096,
          rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 256}), 4096),
    (dict(max_position_embeddings=131072, head_dim=64, rope_theta=1000000.0,
          rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}), 131072),
    (dict(max_position_embeddings=8192, head_dim=32,
          rope_parameters={"rope_type": "yarn", "rope_theta": 50000.0, "factor": 16.0, "beta_fast": 20.0, "beta_slow": 2.0,
                           "truncate": False, "mscale": 0.707, "mscale_all_dim": 0.5,
                           "original_max_position_embeddings": 512}), 8192),
    (dict(max_position_embeddings=2048,
          rope_scaling={"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.25,
                        "original_max_position_embeddings": 1024}), 2048),
]


def main():
    out = []
    for config, length in CASES:
        config = {**SHAPE, **config}
        rotary = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(config))))
        cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
        half = cos.shape[-1] // 2
        at = [0, 1, 2, 3, 77, length // 3, length - 1]
        out.append({"config": config, "length": length, "positions": at,
                    "cos": [[float(f"{v:.9g}") for v in cos[0, t, :half].tolist()] for t in at],
                    "sin": [[float(f"{v:.9g}") for v in sin[0, t, :half].tolist()] for t in at]})
    with open(sys.argv[1], "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(c) for c in out) + "\n]\n")


main()
