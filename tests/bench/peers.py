# SPDX-License-Identifier: Apache-2.0
"""One training step of GPT-2 124M by another program, timed.

usage: peers.py eager|compiled|fsdp2|deepspeed LENGTH WARM_UP COUNTED TOKENS

Run by the Python of build/peers/venv; fsdp2 and deepspeed under torchrun with two processes. transformers' model with
its default attention (scaled_dot_product_attention), fp32, no dropout, batch 4 in micro-batches of 2: two after each
other in one process, or one each in two. AdamW is PyTorch's fused one where the peer takes it, gradients are clipped
to norm 1. TOKENS is a file of uint16. Prints a JSON object, in two processes by the first.
"""
import json
import os
import sys
import time

import numpy
import torch
import torch.distributed
import transformers

MICRO_BATCH = 2
OPTIMIZER = {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def model():
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=50257, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
                                     use_cache=False)
    return transformers.GPT2LMHeadModel(config).train()


def loss_of(net, tokens):
    logits = net(tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batches(path, length, rank, ranks):
    """A rank's micro-batches, for ever; fresh tokens as long as the file has some."""
    tokens = numpy.memmap(path, dtype=numpy.uint16, mode="r")
    each = MICRO_BATCH * (length + 1)
    n = len(tokens) // each
    while True:
        for i in range(rank, n, ranks):
            micro_batch = tokens[i * each:(i + 1) * each].astype(numpy.int64)
            yield torch.from_numpy(micro_batch).view(MICRO_BATCH, length + 1)


def eager(data, compiled=False):
    net = model()
    loss_function = torch.compile(loss_of) if compiled else loss_of
    optimizer = torch.optim.AdamW(net.parameters(), fused=True, **OPTIMIZER)

    def step():
        total = 0.0
        for _ in range(2):
            loss = loss_function(net, next(data)) / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def fsdp2(data):
    from torch.distributed.fsdp import fully_shard
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    net = model()
    for block in net.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True, **OPTIMIZER)

    def step():
        loss = loss_of(net, next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def deepspeed(data):
    import deepspeed as ds
    ds.init_distributed(dist_backend="gloo")
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True, **OPTIMIZER)
    engine, _, _, _ = ds.initialize(model=net, optimizer=optimizer, config=config)

    def step():
        loss = loss_of(engine, next(data))
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def measure(step, warm_up, counted):
    seconds, losses = [], []
    for _ in range(warm_up + counted):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        begin = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - begin)
    return seconds[warm_up:], losses


def main():
    peer, length, warm_up, counted, path = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank = int(os.environ.get("RANK", "0"))
    data = batches(path, length, rank, int(os.environ.get("WORLD_SIZE", "1")))
    makers = {
        "eager": eager,
        "compiled": lambda d: eager(d, compiled=True),
        "fsdp2": fsdp2,
        "deepspeed": deepspeed,
    }
    seconds, losses = measure(makers[peer](data), warm_up, counted)
    if not all(numpy.isfinite(losses)):
        sys.exit(f"a loss is not finite: {losses}")
    if rank == 0:
        print(json.dumps({"seconds": seconds, "losses": losses}), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


main()
