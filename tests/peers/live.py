# SPDX-License-Identifier: Apache-2.0
"""A job through the whole mesh against PyTorch and transformers, live.

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


def job(directory, name, lr, weight_decay, steps, tie):
    config = {
        "train_batch_size": WINDOWS,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "betas": [0.9, 0.95], "eps": EPS, "weight_decay": weight_decay}},
        "zero_optimization": {"stage": 3},
        "shardmesh": {
            "model": {"model_type": "gpt2", "vocab_size": 256, "n_positions": 64, "n_embd": 80, "n_layer": 3, "n_head": 5,
                      "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": tie},
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
    model, info = AutoModelForCausalLM.from_pretrained(run_dir / "model", output_loading_info=True)
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


def compare(tie, directory):
    text = (ROOT / "LICENSE").read_bytes()[: WINDOWS * LENGTH + 1]
    (directory / "text.txt").write_bytes(text)
    tokens = torch.tensor(list(text)).unfold(0, LENGTH + 1, LENGTH)
    model = load(job(directory, f"start-{tie}", 0.0, 0.0, 1, tie))
    done = job(directory, f"trained-{tie}", LR, WEIGHT_DECAY, STEPS, tie)
    worst = 0.0
    ours = [json.loads(line) for line in (done / "steps.jsonl").open()]
    for i, ((loss, norm), line) in enumerate(zip(train(model, tokens), ours, strict=True)):
        worst = max(worst, close(f"loss of step {i + 1}", line["loss"], loss))
        worst = max(worst, close(f"norm of step {i + 1}", line["grad_norm"], norm))
    trained = load(done)
    for (name, want), (other, got) in zip(model.named_parameters(), trained.named_parameters(), strict=True):
        assert name == other
        error = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-30)
        worst = max(worst, close(f"{name} (largest error)", 1 + error, 1.0))
    with torch.no_grad():
        error = (model(tokens[:4, :-1]).logits - trained(tokens[:4, :-1]).logits).abs().max().item()
    if error > 1e-4:
        sys.exit(f"logits differ by {error}")
    print(f"{'tied' if tie else 'untied'} head: loss, norm and parameters within {worst:.1e}; logits within {error:.1e}")


def logits_of_generate(directory):
    """Our greedy continuation is transformers' greedy continuation."""
    run_dir = directory / "trained-True"
    prompt = "Licensed "
    ours = subprocess.run([BIN / "meshctl", "generate", "--model", run_dir / "model", "--prompt", prompt, "--tokens", "40",
                           "--temperature", "0"], check=True, capture_output=True).stdout
    model = load(run_dir)
    ids = torch.tensor([list(prompt.encode())])
    with torch.no_grad():
        theirs = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[0].tolist()
    if ours.rstrip(b"\n") != bytes(theirs).rstrip(b"\n"):
        sys.exit(f"generate: {ours!r}\n differs from {bytes(theirs)!r}")
    print("generate: the same 40 greedy tokens")


with tempfile.TemporaryDirectory(prefix="shardmesh-peers-") as d:
    for tied in (True, False):
        compare(tied, pathlib.Path(d))
    logits_of_generate(pathlib.Path(d))
print("peers: all comparisons hold")
