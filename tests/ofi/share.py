# SPDX-License-Identifier: Apache-2.0
"""share.py NAMESPACE NAMESPACE: two hosts of a shard service and two workers each; what crosses between them.

By --fabric auto a worker uses shared memory with its own host's shard service and the network with the other. Each host
needs the other's parameters once a step, and sends it the gradients of its two workers: what comes in over the link is
that, counted by the workers and by the interface.
"""
import json
import os
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "integration"))
from harness import BIN, bits, check, clean_environment, config, main, run, same_bits, wait_for  # noqa: E402

NETS = []
STEPS = 10
MODEL = {"model_type": "gpt2", "vocab_size": 1024, "n_positions": 64, "n_embd": 256, "n_layer": 4, "n_head": 4}


def make_config(directory, **changes):
    """Four micro-batches, so that each of the four workers has one and pushes one gradient a step."""
    path = config(directory, steps=STEPS, eval_interval=0, eval_batches=0, workers=4, model=MODEL,
                  **changes)
    job = json.loads(path.read_text())
    job["train_batch_size"] = 4 * job["train_micro_batch_size_per_gpu"]
    path.write_text(json.dumps(job))
    return path


def members(directory, path, run_dir):
    token = directory / "token"
    token.write_text(os.urandom(32).hex())
    token.chmod(0o600)
    link = ["--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "share"]
    commands = [[NETS[0], BIN / "meshctl", "coordinator", "--config", path, "--run-dir", run_dir, "--rdzv-id", "share",
                 "--listen", "10.77.0.1:29400"]]
    for net in NETS:
        commands.append([net, BIN / "shardsvc", *link])
        commands += 2 * [[net, BIN / "worker", *link]]
    env = clean_environment(SHARDMESH_TOKEN_FILE=str(token))
    started = []
    for i, command in enumerate(commands):
        with open(directory / f"{run_dir.name}-{i}.log", "w") as log:
            started.append(subprocess.Popen(["ip", "netns", "exec", *map(str, command)], env=env, stdout=log, stderr=log))
    return started


def arrived(net):
    """Bytes that came in over the link."""
    said = subprocess.run(["ip", "-n", net, "-s", "-j", "link", "show", "link0"], check=True, capture_output=True)
    return json.loads(said.stdout)[0]["stats64"]["rx"]["bytes"]


def fetched(text):
    """Parameter bytes that a worker read over the network, and those for portions that it had to seize."""
    said = re.search(r"sharing: (\d+) .*\((\d+) bytes\)", text)
    check(said, f"a worker does not say what it read:\n{text}")
    return tuple(map(int, said.groups()))


def job(directory, name, **changes):
    """Per host: what its workers read over the network, what of it was seized, and what came in over the link."""
    path = make_config(directory, **changes)
    before = [arrived(net) for net in NETS]
    started = members(directory, path, directory / name)
    try:
        wait_for(lambda: all(p.poll() is not None for p in started), "the members to end", 120)
    finally:
        for p in started:
            p.kill()
        said = [(directory / f"{name}-{i}.log").read_text() for i in range(len(started))]
    for p, text in zip(started, said):
        check(p.returncode == 0, f"{p.args[4]} exited with {p.returncode}:\n{text}")
    came = [arrived(net) - b for net, b in zip(NETS, before)]
    out = []
    for host, first in enumerate((2, 5)):
        workers = [fetched(text) for text in said[first:first + 2]]
        out.append((sum(w[0] for w in workers), sum(w[1] for w in workers), came[host]))
    return out


def once(directory):
    run(make_config(directory), "--run-dir", directory / "local", "--fabric", "local")
    want = bits(directory / "local", STEPS)
    off = job(directory, "off", host_sharing=False)
    same_bits("each worker for itself", bits(directory / "off", STEPS), want)
    on = job(directory, "on")
    same_bits("shared", bits(directory / "on", STEPS), want)
    for host in range(2):
        there = off[host][0] // (2 * STEPS)  # the other host's parameters
        # Of the other host's two workers; one sum of both where they are siblings of the tree.
        gradients = 2 * there * STEPS
        check(off[host][0] == 2 * there * STEPS, f"without sharing: {off}")
        read = on[host][0] - on[host][1]
        print(f"host {host}: {there} bytes of parameters there; {on[host][0]} read ({on[host][1]} seized), "
              f"{on[host][2]} came in; without sharing {off[host][0]} and {off[host][2]}")
        # The first version may be there before the two know each other.
        check(STEPS * there <= read <= (STEPS + 1) * there, f"host {host} read {read}, {there} a step expected: {on}")
        # Headers and the control plane come on top, with and without sharing.
        check(on[host][0] + gradients // 2 <= on[host][2] <= 1.2 * (on[host][0] + gradients),
              f"host {host}: {on[host][2]} bytes came in, {on[host][0] + gradients} are accounted for")
        saved = off[host][2] - on[host][2]
        check(saved >= 0.9 * (off[host][0] - read),
              f"host {host}: {saved} bytes less came in, {off[host][0] - read} less were read")


if __name__ == "__main__":
    NETS.extend(sys.argv[1:])
    del sys.argv[1:]
    main([once])
