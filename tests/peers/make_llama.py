# SPDX-License-Identifier: Apache-2.0
"""Makes tests/peers/{llama,mistral,qwen2,qwen3}.safetensors: what PyTorch and transformers say of a small model of each.

A file holds transformers' config.json (config, a float a byte), the initial parameters (init.NAME), the tokens of 2
micro-batches (tokens, as floats), their logits and the mean of their losses, and the gradients of that mean (grad.NAME).
The models differ in what their families can: frequencies stretched as Llama 3's, a sliding window, biases, windows in
some layers only, the norm of each head's q and k, heads wider than the residual's share, tied and untied heads.

usage: make_llama.py OUT_DIRECTORY
"""
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

MICRO, BATCH, LENGTH, VOCAB = 2, 2, 20, 61
SIZES = dict(vocab_size=VOCAB, max_position_embeddings=32, hidden_size=32, num_hidden_layers=2, intermediate_size=40,
             num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15, attention_dropout=0.0,
             bos_token_id=None, eos_token_id=None)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, rope_theta=500.0, tie_word_embeddings=False, rope_scaling=dict(
        rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)),
    "mistral": MistralConfig(**SIZES, sliding_window=7, head_dim=12, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1,
                         tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
}


def model(config):
    torch.manual_seed(1)
    m = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # Biases and norms away from their start values, so that a term left out shows.
    for name, p in m.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    return m.float()


def numbers(config):
    m = model(config)
    out = {"init." + n: p.detach().clone() for n, p in m.named_parameters()}
    tokens = torch.randint(0, VOCAB, (MICRO, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    all_logits, total = [], 0.0
    for t in tokens:
        logits = m(t[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), t[:, 1:].reshape(-1))
        (loss / MICRO).backward()
        total += loss.item() / MICRO
        all_logits.append(logits.detach())
    out.update({"grad." + n: p.grad.clone() for n, p in m.named_parameters()})
    out["config"] = torch.tensor(list(config.to_json_string(use_diff=False).encode()), dtype=torch.float32)
    out["tokens"] = tokens.float()
    out["logits"] = torch.stack(all_logits)
    out["loss"] = torch.tensor([total])
    return {k: v.contiguous() for k, v in out.items()}


def main():
    for name, config in CONFIGS.items():
        path = pathlib.Path(sys.argv[1]) / f"{name}.safetensors"
        out = numbers(config)
        save_file(out, path, metadata={"format": "pt"})
        print(f"{path}: {path.stat().st_size} bytes, loss {out['loss'].item()}")


main()
