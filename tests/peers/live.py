# SPDX-License-Identifier: Apache-2.0
"""Jobs through the whole mesh against PyTorch and transformers, live: GPT-2, Llama, Mistral, Qwen2 and Qwen3.

The data are exactly one step's worth of windows, so every step sees all of them and their order does not matter. The
initial parameters are what a job with learning rate 0 exports. Then 3 AdamW steps with clipping on both sides: losses
and norms from steps.jsonl, parameters and logits from RUN_DIR/model, read by transformers.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM

BIN = pathlib.Path(os.environ["SHARDMESH_BIN"])
ROOT = pathlib.Path(__file__).resolve().parents[2]
WINDOWS, LENGTH, STEPS, CLIP = 24, 32, 3, 0.5
LR, WEIGHT_DECAY, EPS = 1e-3, 0.1, 1e-4
TOLERANCE = 1e-5

GPT2 = {"model_type": "gpt2", "vocab_size": 256, "n_positions": 64, "n_embd": 80, "n_layer": 3, "n_head": 5, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0, "resid_pdrop": 0.0}
LLAMA = {"vocab_size": 256, "max_position_embeddings": 64, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.0, "initializer_range": 0.05}
# Each with what its family alone has: stretched frequencies, windows shorter than a sample, biases, the norm of q and k,
# heads wider than their share.
MODELS = {
    "gpt2, tied": {**GPT2, "tie_word_embeddings": True},
    "gpt2, untied": {**GPT2, "tie_word_embeddings": False},
    "llama": {**LLAMA, "model_type": "llama", "tie_word_embeddings": False, "rope_theta": 500.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 9, "tie_word_embeddings": False},
    "qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 7,
              "max_window_layers": 1},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
}


def job(directory, name, lr, weight_decay, steps, model):
    config = {
        "train_batch_size": WINDOWS,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "betas": [0.9, 0.95], "eps": EPS, "weight_decay": weight_decay}},
        "zero_optimization": {"stage": 3},
        "shardmesh": {
            "model": model,
            "data": {"train": str(directory / "text.txt"), "format": "bytes", "sequence_length": LENGTH},
            "steps": steps, "seed": 3, "eval_batches": 0, "shards": 3, "workers": 2, "threads_per_worker": 1,
            "run_dir": str(directory / name),
        },
    }
    path = directory / f"{name}.json"
    path.write_text(json.dumps(config))
    subprocess.run([BIN / "meshctl", "run", "--config", path], check=True, stdout=subprocess.DEVNULL)
    return directory / name


def load(run_dir):
    # eager: the plain formula, so that a difference is ours; a window is a mask there.
    model, info = AutoModelForCausalLM.from_pretrained(run_dir / "model", output_loading_info=True,
                                                       attn_implementation="eager", dtype=torch.float32)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            sys.exit(f"transformers reports {kind}: {info[kind]}")
    return model.eval()


def train(model, tokens):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=EPS, weight_decay=WEIGHT_DECAY)
    rows = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        rows.append((loss.item(), norm.item()))
    return rows


def close(what, got, want, scale=None):
    scale = scale or max(abs(want), 1e-30)
    error = abs(got - want) / scale
    if not error <= TOLERANCE:
        sys.exit(f"{what}: {got} against {want}, off by {error:.2e} of the largest magnitude, allowed {TOLERANCE}")
    return error


def compare(name, directory):
    place = name.replace(", ", "-")
    text = (ROOT / "LICENSE").read_bytes()[: WINDOWS * LENGTH + 1]
    (directory / "text.txt").write_bytes(text)
    tokens = torch.tensor(list(text)).unfold(0, LENGTH + 1, LENGTH)
    model = load(job(directory, f"start-{place}", 0.0, 0.0, 1, MODELS[name]))
    done = job(directory, f"trained-{place}", LR, WEIGHT_DECAY, STEPS, MODELS[name])
    worst = 0.0
    ours = [json.loads(line) for line in (done / "steps.jsonl").open()]
    for i, ((loss, norm), line) in enumerate(zip(train(model, tokens), ours, strict=True)):
        worst = max(worst, close(f"{name}: loss of step {i + 1}", line["loss"], loss))
        worst = max(worst, close(f"{name}: norm of step {i + 1}", line["grad_norm"], norm))
    trained = load(done)
    for (tensor, want), (other, got) in zip(model.named_parameters(), trained.named_parameters(), strict=True):
        assert tensor == other
        error = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-30)
        worst = max(worst, close(f"{name}: {tensor} (largest error)", 1 + error, 1.0))
    with torch.no_grad():
        error = (model(tokens[:4, :-1]).logits - trained(tokens[:4, :-1]).logits).abs().max().item()
    if error > 1e-4:
        sys.exit(f"{name}: logits differ by {error}")
    print(f"{name}: loss, norm and parameters within {worst:.1e}; logits within {error:.1e}")


def logits_of_generate(directory, place):
    """Our greedy continuation is transformers' greedy continuation."""
    run_dir = directory / f"trained-{place}"
    prompt = "Licensed "
    ours = subprocess.run([BIN / "meshctl", "generate", "--model", run_dir / "model", "--prompt", prompt, "--tokens", "40",
                           "--temperature", "0"], check=True, capture_output=True).stdout
    model = load(run_dir)
    ids = torch.tensor([list(prompt.encode())])
    with torch.no_grad():
        theirs = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[0].tolist()
    if ours.rstrip(b"\n") != bytes(theirs).rstrip(b"\n"):
        sys.exit(f"generate: {ours!r}\n differs from {bytes(theirs)!r}")
    print(f"generate, {place}: the same 40 greedy tokens")


with tempfile.TemporaryDirectory(prefix="shardmesh-peers-") as d:
    for each in MODELS:
        compare(each, pathlib.Path(d))
    for each in ("gpt2-tied", "llama", "qwen3"):
        logits_of_generate(pathlib.Path(d), each)
print("peers: all comparisons hold")
