# SPDX-License-Identifier: Apache-2.0
"""Every process takes what its plan says: within 5 % or 32 MiB of it, whichever is more, at its peak.

Measured from outside, while the job runs: a process's anonymous memory, and the shared memory objects that are its own
(their names carry the member's id). Mapped files and other members' memory are not its own. The plan is what the
process itself logged before it took anything; what `meshctl plan` prints must be the same.

SHARDMESH_MEMORY_TABLE=1 prints planned and measured of every case, as docs/memory.md has them.
"""
import itertools
import json
import os
import re
import signal
import subprocess
import time

from harness import BIN, check, clean_environment, config, finish, lines, main, members, start, wait_for

MIB = 1 << 20
GPT2 = {"model_type": "gpt2", "vocab_size": 8192, "n_positions": 128, "n_embd": 512, "n_layer": 8, "n_head": 8,
        "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
LLAMA = {"model_type": "llama", "vocab_size": 8192, "max_position_embeddings": 128, "hidden_size": 512,
         "num_hidden_layers": 8, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
# A micro-batch of 2048 rows has 393 MiB of logits: more than exist at once.
WIDE = {"model_type": "gpt2", "vocab_size": 50304, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
MODELS = {"gpt2": GPT2, "llama": LLAMA, "wide": WIDE}


def status(pid, name):
    with open(f"/proc/{pid}/status") as f:
        return int(re.search(rf"^{name}:\s+(\d+) kB", f.read(), re.M).group(1)) * 1024


def own_objects(pid, member):
    """Resident bytes of memory objects that the member made, by inode: some are mapped in pieces."""
    objects, name = {}, None
    with open(f"/proc/{pid}/smaps") as f:
        for line in f:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                fields = line.split(maxsplit=5)
                name = fields[4] if len(fields) > 5 and re.search(rf"memfd:shardmesh-.*-{member}-\w", fields[5]) else None
            elif name and line.startswith("Rss:"):
                objects[name] = objects.get(name, 0) + int(line.split()[1]) * 1024
    return sum(objects.values())


class Watched:
    """A member: its log, its plan, and the most that it was seen to take."""

    def __init__(self, pid, program):
        self.pid, self.program, self.private, self.shared = pid, program, 0, 0
        self.log = os.readlink(f"/proc/{pid}/fd/2")

    def logged(self, pattern):
        with open(self.log) as f:
            return re.findall(pattern, f.read())

    def look(self, closely):
        try:
            self.private = max(self.private, status(self.pid, "RssAnon"))
            names = self.logged(r'"who":"(?:worker|shard)-(\d+)"') if closely else []
            if names:
                self.shared = max(self.shared, own_objects(self.pid, names[0]))
        except (OSError, AttributeError):
            pass  # it has ended

    def planned(self):
        totals = self.logged(r"memory plan: (\d+) bytes \([^)]*\) in all")
        return int(totals[0]) if totals else 0

    def lines(self):
        return [(name, int(n)) for name, n in self.logged(r"memory plan: ([^:\"]+): (\d+) bytes")]


def watch(path, *flags, during=None):
    """Runs a job and looks at its members until it ends; `during` is called at every look with the process."""
    process, seen, looks = start(path, *flags), {}, 0
    while process.poll() is None:
        for program in ("shardsvc", "worker"):
            for pid in members(process, program):
                try:
                    seen.setdefault(pid, Watched(pid, program)).look(looks % 4 == 0)
                except OSError:
                    pass
        if during:
            during(process)
        looks += 1
        time.sleep(0.1)
    code, out = finish(process)
    check(code == 0, f"exit code {code}:\n{out}")
    return list(seen.values()), out


def compare(name, seen, shards, workers):
    check(len(seen) == shards + workers, f"{name}: {len(seen)} members were seen, not {shards + workers}")
    for m in seen:
        planned, measured = m.planned(), m.private + m.shared
        check(planned > 0, f"{name}: no plan in {m.log}")
        if os.environ.get("SHARDMESH_MEMORY_TABLE"):
            print(f"| {name} | {m.program} | {planned / MIB:.1f} | {measured / MIB:.1f} | "
                  f"{100 * (measured - planned) / planned:+.1f} % |", flush=True)
        room = max(planned * 0.05, 32 * MIB)
        check(abs(measured - planned) <= room,
              f"{name}: {m.program} took {measured / MIB:.1f} MiB ({m.private / MIB:.1f} private, {m.shared / MIB:.1f} "
              f"shared of its own), {planned / MIB:.1f} were planned")
        check(not m.logged("do not fit the plan"), f"{name}: partial sums beyond the plan")
        for most, allowed in m.logged(r"live window: at most (\d+) parameters at once, of (\d+) allowed"):
            check(int(most) <= int(allowed), f"{name}: {most} parameters were live, {allowed} are allowed")


def job(directory, model="gpt2", micro=2, sequence=64, live=0, n_micro=4, steps=2, **changes):
    zero = {"stage": 3}
    if live:
        zero |= {"stage3_max_live_parameters": live, "stage3_prefetch_bucket_size": live // 2,
                 "stage3_max_reuse_distance": 0}
    path = config(directory, model=MODELS[model], steps=steps, eval_batches=0, state_hash_interval=0, **changes)
    c = json.loads(path.read_text())
    c |= {"train_batch_size": micro * n_micro, "train_micro_batch_size_per_gpu": micro, "zero_optimization": zero}
    c["shardmesh"]["data"] |= {"sequence_length": sequence, "validation_fraction": 0.0}
    path.write_text(json.dumps(c))
    return path


def case(directory, shards, workers, threads, fabric, model, activations, micro, live=0, sequence=64, **more):
    name = f"{shards} + {workers} x {threads}, {fabric}, {model}, {activations}, {micro} x {sequence}"
    name += f", live {live}" if live else ""
    path = job(directory, model, micro, sequence, live, activations=activations, **more)
    flags = ("--shards", shards, "--workers", workers, "--threads", threads, "--fabric", fabric)
    seen, out = watch(path, *flags, "--run-dir", directory / name.replace(" ", ""))
    compare(name, seen, shards, workers)
    agree(name, out, seen)
    if live:
        window = [m.logged(r"live window: .* of (\d+) allowed")[0] for m in seen if m.program == "worker"]
        needed = 8192 * 512 + 1024 * 1024  # the tied embedding beside the head, or the largest unit: raised to that
        check(all(int(w) <= max(live, needed) for w in window), f"{name}: windows of {window}")
    return seen


def agree(name, out, seen):
    """What meshctl printed before it started anything is what the members planned. Which pages a shard service gets
    follows from member ids, dealt as they join, so that those differ by some runs."""
    printed = {p: float(n) * (1 << 20 if unit == "MiB" else 1 << 30) for p, n, unit in
               re.findall(r"^memory of each of \d+ (\w+).*\n(?:  .*\n)*?  total +([\d.]+) (MiB|GiB)$", out, re.M)}
    for program, word, within in (("shardsvc", "shard", 0.03), ("worker", "workers", 0.002)):
        largest = max((m for m in seen if m.program == program), key=Watched.planned)
        for line, _ in largest.lines():
            check(re.search(rf"^  {re.escape(line)} ", out, re.M), f"{name}: meshctl does not print '{line}'")
        apart = abs(printed[word] - largest.planned()) / largest.planned()
        check(apart < within, f"{name}: a {program} plans {largest.planned() / MIB:.1f} MiB; meshctl printed:\n{out}")


def walk(directory):
    """A walk through the matrix in which every value of every column appears, and most pairs of them."""
    case(directory, 1, 1, 2, "local", "gpt2", "keep", 2)
    case(directory, 2, 2, 1, "local", "llama", "recompute", 4)
    case(directory, 3, 1, 1, "local-copy", "gpt2", "recompute", 1, live=1)
    case(directory, 2, 2, 2, "local-copy", "llama", "keep", 2, live=8000000)
    case(directory, 1, 2, 1, "local-copy", "gpt2", "keep", 4)
    case(directory, 3, 2, 2, "local", "gpt2", "recompute", 1)


def pieces(directory):
    """A micro-batch whose logits do not exist at once."""
    for fabric, n_micro in (("local", 1), ("local-copy", 4)):
        seen = case(directory, 1, 1, 2, fabric, "wide", "keep", 16, sequence=128, n_micro=n_micro)
        for m in seen:
            for line, n in m.lines():
                check(line != "final norm and logits" or n < 300 * MIB, f"{line} takes {n / MIB:.1f} MiB")


def connections(directory):
    """A network's buffers are by connection, and of the plan."""
    for shards, workers in ((8, 1), (1, 8)):
        seen = case(directory, shards, workers, 1, "ofi", "llama", "recompute", 1, steps=1)
        check(all("connections" in [name for name, _ in m.lines()] for m in seen), "connections are not planned")


def whole(directory):
    """The whole matrix; long."""
    rest = itertools.product((1, 2, 3), (1, 2), (1, 2), ("local", "local-copy"), ("gpt2", "llama"),
                             (("keep", 1), ("keep", 4), ("recompute", 2)), (0, 1))
    for shards, workers, threads, fabric, model, (activations, micro), live in rest:
        if fabric == "local-copy" or not live:
            case(directory, shards, workers, threads, fabric, model, activations, micro, live=live)


def shares(directory):
    """A shard service's state falls as 1/N."""
    state = {}
    for shards in (1, 2, 4):
        path = job(directory, steps=1, n_micro=2, micro=1)
        seen, _ = watch(path, "--shards", shards, "--workers", 1, "--threads", 2, "--run-dir", directory / f"n{shards}")
        compare(f"{shards} shard services", seen, shards, 1)
        services = [m for m in seen if m.program == "shardsvc"]
        base = [sum(n for name, n in m.lines() if name in ("the process itself", "kernels' workspace", "rings and tables"))
                for m in services]
        state[shards] = max(m.private + m.shared - b for m, b in zip(services, base))
    for shards in (2, 4):
        share = state[shards] * shards / state[1]
        check(0.95 < share < 1.1, f"{shards} shard services hold {share:.2f} of what one holds, together: {state}")


def stopped(directory):
    """Small arenas, one held node, and a worker that stops for a while: the step completes inside the plan."""
    path = job(directory, micro=1, n_micro=12, live=1, max_held_nodes=1, partial_sum_memory=24 << 20)
    for fabric in ("local-copy", "local"):
        stop = {}

        def disturb(process):
            workers = members(process, "worker")
            if not stop and len(workers) == 3 and lines(directory / fabric) >= 1:
                stop["pid"], stop["at"] = workers[0], time.monotonic()
                os.kill(workers[0], signal.SIGSTOP)
            elif "at" in stop and time.monotonic() - stop["at"] > 3:
                del stop["at"]
                os.kill(stop["pid"], signal.SIGCONT)

        seen, _ = watch(path, "--shards", 2, "--workers", 3, "--threads", 1, "--fabric", fabric, "--run-dir",
                        directory / fabric, during=disturb)
        check("pid" in stop, "the test is stale: no worker was stopped")
        compare(f"stopped worker, {fabric}", seen, 2, 3)


def joined(directory):
    """An inbox for a worker beyond those asked for is added to the plan, aloud."""
    path = job(directory, micro=1, steps=1000)
    process = start(path, "--shards", 1, "--workers", 1, "--threads", 1, "--fabric", "local-copy", "--rdzv-id", "joined")
    run_dir = directory / "run"
    log = run_dir / "log/shardsvc-0.log"
    try:
        wait_for(lambda: lines(run_dir) >= 1, "step 1", 60)
        subprocess.Popen([BIN / "worker", "--rdzv-endpoint", (run_dir / "endpoint").read_text().strip(), "--rdzv-id",
                          "joined"], env=clean_environment(SHARDMESH_TOKEN_FILE=str(run_dir / "token")),
                         stderr=subprocess.DEVNULL)
        wait_for(lambda: "memory plan: one more inbox" in log.read_text(), "the larger plan", 60)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its members die with it, and the worker with the coordinator
        process.wait()


def command(directory):
    """meshctl plan starts nothing, prints what run prints, and refuses what does not fit with exit code 42."""
    path = job(directory)
    p = subprocess.run([BIN / "meshctl", "plan", "--config", path], capture_output=True, text=True, timeout=60,
                       env=clean_environment())
    check(p.returncode == 0 and "each of 2 workers" in p.stdout and "in all:" in p.stdout, p.stdout + p.stderr)
    check(not (directory / "run").exists(), "meshctl plan made a run directory")
    p = subprocess.run([BIN / "meshctl", "plan", "--config", path, "--shards", "1024"], capture_output=True, text=True,
                       timeout=60, env=clean_environment())
    check(p.returncode == 0 and "each of 1024 shard services" in p.stdout, f"{p.returncode}: {p.stdout + p.stderr}")
    path.write_text(path.read_text().replace('"n_embd": 512', '"n_embd": 65536'))
    p = subprocess.run([BIN / "meshctl", "plan", "--config", path], capture_output=True, text=True, timeout=60,
                       env=clean_environment())
    check(p.returncode == 42 and "GiB" in p.stderr, f"exit code {p.returncode}: {p.stdout + p.stderr}")


if __name__ == "__main__":
    main([walk, pieces, connections, whole, shares, stopped, joined, command])
