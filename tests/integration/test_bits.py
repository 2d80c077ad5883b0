# SPDX-License-Identifier: Apache-2.0
"""Same bits: loss, gradient norm, held-out loss and state hash do not depend on who does the work."""
import itertools
import json
import os
import random
import subprocess

from harness import BIN, bits, check, clean_environment, config, finish, main, run, same_bits, start, wait_for

STEPS = 4
LLAMA = {
    "model_type": "llama", "vocab_size": 256, "max_position_embeddings": 64, "hidden_size": 64, "num_hidden_layers": 2,
    "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1,
}


def one(directory, name, *flags, **changes):
    run_dir = directory / name
    run(config(directory, **changes), "--run-dir", run_dir, *flags)
    return bits(run_dir, STEPS)


def matrix(directory):
    """Shards {1,2,3,5} x workers {1,2,3} x threads {1,2}, M = 12."""
    want = None
    for shards, workers, threads in itertools.product((1, 2, 3, 5), (1, 2, 3), (1, 2)):
        name = f"s{shards}w{workers}t{threads}"
        got = one(directory, name, "--shards", shards, "--workers", workers, "--threads", threads)
        check(all(r[6] != "None" for r in got), f"{name}: a line without state_hash")
        check(got[2][5] != "None", f"{name}: step 3 has no validation_loss")
        want = want or got
        same_bits(name, got, want)
    seeds = one(directory, "other-seed", "--seed", 8)
    check(seeds[0][1] != want[0][1], "another seed gave the same loss: the comparison proves nothing")


def small(directory):
    """A corner of the matrix, for sanitizer builds."""
    want = one(directory, "s1w1", "--shards", 1, "--workers", 1)
    same_bits("s3w2", one(directory, "s3w2", "--shards", 3, "--workers", 2, "--threads", 2), want)
    same_bits("copy", one(directory, "copy", "--shards", 2, "--workers", 2, "--fabric", "local-copy"), want)


def variants(directory):
    """Reads and pushes instead of mapping; a tiny live window; activations recomputed; one held node; little memory."""
    want = one(directory, "plain")
    same_bits("copy", one(directory, "copy", "--fabric", "local-copy", "--workers", 3, "--shards", 3), want)
    same_bits("window", one(directory, "window", "--fabric", "local-copy",
                            zero_optimization__stage3_max_live_parameters=1,
                            zero_optimization__stage3_prefetch_bucket_size=1,
                            zero_optimization__stage3_max_reuse_distance=0), want)
    same_bits("recompute", one(directory, "recompute", activations="recompute"), want)
    same_bits("held", one(directory, "held", "--workers", 3, max_held_nodes=1), want)
    same_bits("held-copy", one(directory, "held-copy", "--workers", 3, "--fabric", "local-copy", max_held_nodes=1), want)
    same_bits("spill", one(directory, "spill", "--workers", 3, partial_sum_memory=2 << 17), want)


def llama(directory):
    """The Llama family too: mapped, copied, recomputed, any numbers of members."""
    want = one(directory, "plain", model=LLAMA)
    same_bits("s1w1", one(directory, "s1w1", "--shards", 1, "--workers", 1, model=LLAMA), want)
    same_bits("copy", one(directory, "copy", "--shards", 3, "--workers", 3, "--threads", 2, "--fabric", "local-copy",
                          model=LLAMA), want)
    same_bits("recompute", one(directory, "recompute", activations="recompute", model=LLAMA), want)


def header(path):
    with open(path, "rb") as f:
        return json.loads(f.read(int.from_bytes(f.read(8), "little")))


def continued(directory):
    """A finished model's files are the next job's first parameters, bit for bit, whoever reads which part."""
    for family in ("gpt2", "llama"):
        first, second = directory / f"{family}-a", directory / f"{family}-b"
        changes = {} if family == "gpt2" else {"model": LLAMA}
        run(config(directory, steps=2, **changes), "--run-dir", first)
        still = config(directory, steps=1, model=str(first / "model"), initialize="weights",
                       optimizer__params={"lr": 0.0, "weight_decay": 0.0},
                       scheduler__params={"warmup_min_lr": 0.0, "warmup_max_lr": 0.0})
        # As a sharded checkpoint with one shard, whose index is wrong where it does no harm.
        tensors = first / "model/model.safetensors"
        names = [n for n in header(tensors) if n != "__metadata__"]
        (first / "model/model-00001-of-00001.safetensors").write_bytes(tensors.read_bytes())
        original = tensors.rename(first / "model/original")
        (first / "model/model.safetensors.index.json").write_text(json.dumps({
            "metadata": {"total_size": 7}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
        run(still, "--run-dir", second, "--shards", 3, "--workers", 1)
        check(any("total_size is 7" in log.read_text() for log in second.glob("log/*.log")), "no word of the index")
        check(original.read_bytes() == (second / "model/model.safetensors").read_bytes(),
              f"{family}: the parameters changed on their way through a job that learns nothing")


def broken_weights(directory):
    """A file that lost its end ends the job with the file's name, not with a hang."""
    run(config(directory, steps=1), "--run-dir", directory / "first")
    path = directory / "first" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    code, out = finish(start(config(directory, weights=str(path)), "--run-dir", directory / "second"))
    check(code != 0 and str(path) in out, f"exit code {code}, and it said:\n{out}")


def by_hand(directory):
    """Coordinator and members started one by one, in any order, the endpoint given to each."""
    want = one(directory, "launched")
    path = config(directory)
    token = directory / "token"
    token.write_text(os.urandom(32).hex())
    token.chmod(0o600)
    env = clean_environment(SHARDMESH_TOKEN_FILE=str(token))
    run_dir = directory / "hand"
    port = free_port()
    link = ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "by-hand"]
    commands = [[BIN / "shardsvc", *link], [BIN / "shardsvc", *link], [BIN / "worker", *link], [BIN / "worker", *link],
                [BIN / "meshctl", "coordinator", "--config", path, "--run-dir", run_dir, "--rdzv-id", "by-hand",
                 "--listen", f"127.0.0.1:{port}"]]
    random.Random(1).shuffle(commands)
    processes = []
    for i, command in enumerate(commands):
        with open(directory / f"hand-{i}.log", "w") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        wait_for(lambda: all(p.poll() is not None for p in processes), "all processes to end", 60)
    finally:
        for p in processes:
            p.kill()
    for i, p in enumerate(processes):
        check(p.returncode == 0, f"{commands[i][0].name} exited with {p.returncode}:\n"
              + (directory / f"hand-{i}.log").read_text())
    same_bits("by hand", bits(run_dir, STEPS), want)


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


main([matrix, small, variants, llama, continued, broken_weights, by_hand])
