# SPDX-License-Identifier: Apache-2.0
"""Same bits: loss, gradient norm, held-out loss and state hash do not depend on who does the work."""
import itertools
import json
import os
import random
import shutil
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


def many(directory):
    """More shard services than a unit has runs, so that most of them hold nothing of most units."""
    want = one(directory, "few", "--shards", 1, "--workers", 1)
    run(config(directory), "--run-dir", directory / "many", "--shards", 66, "--workers", 1, "--threads", 1, seconds=150)
    same_bits("66 shard services", bits(directory / "many", STEPS), want)


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
    by_hand_job(directory, [["shardsvc"], ["shardsvc"], ["worker"], ["worker"]])
    same_bits("by hand", bits(directory / "hand", STEPS), want)


def providers():
    """What this build has besides shared memory."""
    said = subprocess.run([BIN / "meshctl", "bench", "fabric", "--fabric", "none"], capture_output=True, text=True,
                          env=clean_environment()).stderr
    return [name for name in ("ofi",) if f" {name}" in said.split("there are")[-1].replace(",", "")]


def mixed(directory):
    """One job, a fabric a worker: memory in place, copied, by a network; the bits know nothing of it."""
    long = {"steps": 100, "eval_interval": 0, "eval_batches": 0}
    run(config(directory, **long), "--run-dir", directory / "launched")
    want = bits(directory / "launched", 100)
    workers = [["worker", "--fabric", "local"], ["worker", "--fabric", "local-copy"], ["worker"]]
    workers += [["worker", "--fabric", name] for name in providers()]
    status = by_hand_job(directory, [["shardsvc"], ["shardsvc"], *workers], workers=len(workers), **long)
    same_bits("mixed", bits(directory / "hand", 100), want)
    used = sorted(pair["provider"] for m in status["members"] if m["role"] == "worker" for pair in m["fabric"])
    check(used == sorted(2 * (["local", "local-copy", "local"] + providers())), f"used: {used}")
    # A shard service that wants copies only: who may choose finds that out by asking.
    status = by_hand_job(directory, [["shardsvc"], ["shardsvc", "--fabric", "local-copy"], ["worker"]], workers=1, **long)
    same_bits("half copied", bits(directory / "hand", 100), want)
    worker, = (m for m in status["members"] if m["role"] == "worker")
    check(sorted(pair["provider"] for pair in worker["fabric"]) == ["local", "local-copy"], worker["fabric"])
    refused = [r for pair in worker["fabric"] for r in pair["refused"] if r["provider"] == "local"]
    check(len(refused) == 1 and "local-copy" in refused[0]["reason"], f"refused: {worker['fabric']}")
    check(worker["counters"]["mesh_fabric_choices_local_copy_total"] == 1, worker["counters"])


FAULTS = "fault:seed=3,delay=200us,drop=0.02,deadline=20ms,reorder=0.2:"


def faults(directory):
    """A network that delays, loses, repeats and reorders, in every member: the bits are the same."""
    want = one(directory, "launched")
    for inner in ["local-copy"] + providers():
        run_dir = directory / f"faults-{inner}"
        code, out = finish(start(config(directory), "--run-dir", run_dir, "--fabric", FAULTS + inner,
                                 environment={"SHARDMESH_FAULTS": "1"}))
        check(code == 0, f"exited with {code}:\n{out}")
        same_bits(inner, bits(run_dir, STEPS), want)
    code, out = finish(start(config(directory), "--run-dir", directory / "refused", "--fabric", FAULTS + "local"))
    check(code != 0 and "SHARDMESH_FAULTS" in out, f"faults without leave: {code}\n{out}")


def pair_lost(directory):
    """A worker whose connection to one shard service ends leaves; the job goes on with the others."""
    long = {"steps": 100, "eval_interval": 0, "eval_batches": 0}
    run(config(directory, **long), "--run-dir", directory / "launched")
    want = bits(directory / "launched", 100)
    cut = ["worker", "--fabric", "fault:seed=2,disconnect=0.002:local-copy"]
    by_hand_job(directory, [["shardsvc"], ["shardsvc"], cut, ["worker"]], may_fail=cut, workers=2, **long)
    same_bits("without one", bits(directory / "hand", 100), want)
    workers = [json.loads(line)["workers"] for line in (directory / "hand/steps.jsonl").open()]
    # It was there: the first step opens when both are ready. It may have gone before that step was over.
    check(workers[-1] == 1, f"workers in steps.jsonl: {workers}")


def by_hand_job(directory, members, may_fail=None, **changes):
    """Runs it to its end in DIR/hand; what meshctl status said last while all were there."""
    shutil.rmtree(directory / "hand", ignore_errors=True)
    path = config(directory, **changes)
    token = directory / "token"
    token.write_text(os.urandom(32).hex())
    token.chmod(0o600)
    env = clean_environment(SHARDMESH_TOKEN_FILE=str(token), SHARDMESH_FAULTS="1")
    run_dir = directory / "hand"
    port = free_port()
    link = ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "by-hand"]
    commands = [[BIN / member[0], *link, *member[1:]] for member in members]
    commands.append([BIN / "meshctl", "coordinator", "--config", path, "--run-dir", run_dir, "--rdzv-id", "by-hand",
                     "--listen", f"127.0.0.1:{port}"])
    random.Random(1).shuffle(commands)
    processes = []
    status = {}
    for i, command in enumerate(commands):
        with open(directory / f"hand-{i}.log", "w") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))

    def over():
        said = subprocess.run([BIN / "meshctl", "status", *link, "--json"], env=env, capture_output=True, text=True)
        if said.returncode == 0:
            now = json.loads(said.stdout)
            if len(now["members"]) == len(members):
                status.update(now)
        return all(p.poll() is not None for p in processes)
    try:
        wait_for(over, "all processes to end", 60)
    finally:
        for p in processes:
            p.kill()
    for i, p in enumerate(processes):
        failed = may_fail is not None and commands[i][5:] == may_fail[1:] and commands[i][0].name == may_fail[0]
        check(p.returncode == int(failed), f"{commands[i][0].name} exited with {p.returncode}:\n"
              + (directory / f"hand-{i}.log").read_text())
    return status


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


main([matrix, small, many, variants, llama, continued, broken_weights, by_hand, mixed, faults, pair_lost])
