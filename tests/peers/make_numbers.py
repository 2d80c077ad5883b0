# SPDX-License-Identifier: Apache-2.0
"""Makes tests/peers/gpt2_small.safetensors: what PyTorch and transformers say of a small GPT-2.

The file holds the initial parameters (init.NAME), the tokens of 3 steps (tokens, as floats), the loss of each step, the
gradients of the first step before clipping (grad.NAME), the global norm of each step, and the parameters after 3 AdamW
steps with clipping (final.NAME). A step is M = 3 micro-batches; the gradient is the mean of theirs. eps is 1e-4, so that
rounding noise in a gradient that is truly zero is not blown up to the size of a step.

usage: make_numbers.py OUT.safetensors
"""
import sys

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

STEPS, MICRO, BATCH, LENGTH = 3, 3, 2, 24
ADAMW = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1)
CLIP = 0.25


def model():
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=67, n_positions=32, n_embd=40, n_layer=2, n_head=5, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0)
    m = GPT2LMHeadModel(config)
    # Biases and norms away from their start values, so that a term left out shows.
    for name, p in m.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=1.0 if "ln_" in name and name.endswith("weight") else 0.0, std=0.1)
    return m


def main():
    m = model()
    out = {"init." + n: p.detach().clone() for n, p in m.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 67, (STEPS, MICRO, BATCH, LENGTH + 1), generator=generator)
    optimizer = torch.optim.AdamW(m.parameters(), **ADAMW)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(MICRO):
            t = tokens[step, micro]
            logits = m(t[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 67), t[:, 1:].reshape(-1))
            (loss / MICRO).backward()
            total += loss.item() / MICRO
        losses.append(total)
        if step == 0:
            out.update({"grad." + n: p.grad.clone() for n, p in m.named_parameters()})
        norms.append(torch.nn.utils.clip_grad_norm_(m.parameters(), CLIP).item())
        optimizer.step()
    out.update({"final." + n: p.detach().clone() for n, p in m.named_parameters()})
    out["tokens"] = tokens.float()
    out["loss"] = torch.tensor(losses)
    out["norm"] = torch.tensor(norms)
    save_file({k: v.contiguous() for k, v in out.items()}, sys.argv[1], metadata={"format": "pt"})
    print(f"{sys.argv[1]}: losses {losses}, norms {norms}")


main()
