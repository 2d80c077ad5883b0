# SPDX-License-Identifier: Apache-2.0
"""What the integration tests share: a tiny job, how to run it, and what it left behind.

The programs are found by SHARDMESH_BIN. Every test works in a temporary directory of its own and removes it unless it
fails. Time limits are there to end a hang, not to measure: sanitizer builds stretch them by SHARDMESH_TEST_SLOW.
"""
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ["SHARDMESH_BIN"])
SLOW = float(os.environ.get("SHARDMESH_TEST_SLOW", "1"))


class Failed(Exception):
    pass


def check(condition, message):
    if not condition:
        raise Failed(message)


def config(directory, **changes):
    """Writes DIR/job.json; keys are of the "shardmesh" section, or dotted paths from the top with '/'."""
    shutil.copy(ROOT / "LICENSE", directory / "text.txt")
    c = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
        "zero_optimization": {"stage": 3},
        "shardmesh": {
            "model": {
                "model_type": "gpt2", "vocab_size": 256, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4,
                "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1,
            },
            "data": {"train": "text.txt", "format": "bytes", "sequence_length": 32, "validation_fraction": 0.2},
            "steps": 4, "seed": 7, "eval_interval": 2, "eval_batches": 3, "shards": 2, "workers": 2,
            "threads_per_worker": 1, "state_hash_interval": 1, "run_dir": "run",
        },
    }
    for key, value in changes.items():
        place = c
        path = key.split("__") if "__" in key else ["shardmesh", key]
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
    path = directory / "job.json"
    path.write_text(json.dumps(c, indent=1))
    return path


@contextlib.contextmanager
def workplace():
    directory = pathlib.Path(tempfile.mkdtemp(prefix="shardmesh-test-"))
    try:
        yield directory
    except BaseException:
        print_logs(directory)
        print(f"left for a look: {directory}", file=sys.stderr)
        raise
    else:
        shutil.rmtree(directory)


def print_logs(directory):
    for log in sorted(directory.glob("**/log/*.log")):
        lines = log.read_text(errors="replace").splitlines()
        print(f"---- {log.name}: last of {len(lines)} lines", file=sys.stderr)
        print("\n".join(lines[-25:]), file=sys.stderr)


def clean_environment(**extra):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SHARDMESH_") or k == "SHARDMESH_BIN"}
    env.update(extra)
    return env


def start(path, *flags, environment=None):
    """meshctl run in the background, in a process group of its own."""
    return subprocess.Popen([BIN / "meshctl", "run", "--config", path, *map(str, flags)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env=clean_environment(**(environment or {})))


def finish(process, seconds=60):
    try:
        out, _ = process.communicate(timeout=seconds * SLOW)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        raise Failed(f"did not end within {seconds * SLOW} s; it said:\n{out}") from None
    return process.returncode, out


def run(path, *flags, seconds=60):
    code, out = finish(start(path, *flags), seconds)
    check(code == 0, f"meshctl run {flags} exited with {code}:\n{out}")
    return out


def steps(run_dir):
    with open(run_dir / "steps.jsonl") as f:
        return [json.loads(line) for line in f]


def bits(run_dir, expected_steps=None):
    """What must be the same for any number of members: the text of the numbers, so that no rounding hides."""
    records = []
    with open(run_dir / "steps.jsonl") as f:
        for line in f:
            # parse_float=str keeps the digits as they were printed
            r = json.loads(line, parse_float=str)
            records.append(tuple(str(r.get(k)) for k in
                                 ("step", "loss", "grad_norm", "lr", "tokens", "validation_loss", "state_hash")))
    if expected_steps is not None:
        check(len(records) == expected_steps, f"{run_dir}: {len(records)} lines, expected {expected_steps}")
    return records


def same_bits(name, got, want):
    for g, w in zip(got, want):
        check(g == w, f"{name}: {g}\n  differs from {w}")
    check(len(got) == len(want), f"{name}: {len(got)} steps, expected {len(want)}")


def children(pid):
    """pid -> command line of all live descendants."""
    found = {}
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            argv = (entry / "cmdline").read_bytes().decode().split("\0")
        except (OSError, IndexError):
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found[int(entry.name)] = argv
            found.update(children(int(entry.name)))
    return found


def members(process, program):
    """pids of the job's processes that run `program` ('coordinator', 'shardsvc', 'worker')."""
    out = []
    for pid, argv in children(process.pid).items():
        name = pathlib.Path(argv[0]).name
        if name == program or (program == "coordinator" and name == "meshctl" and "coordinator" in argv):
            out.append(pid)
    return sorted(out)


def wait_for(condition, what, seconds=30):
    deadline = time.monotonic() + seconds * SLOW
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise Failed(f"waited {seconds * SLOW} s for {what}")


def lines(run_dir):
    try:
        return (run_dir / "steps.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def main(tests):
    names = sys.argv[1:] or [t.__name__ for t in tests]
    failed = 0
    for t in tests:
        if t.__name__ not in names:
            continue
        began = time.monotonic()
        try:
            with workplace() as directory:
                t(directory)
            print(f"ok   {t.__name__} ({time.monotonic() - began:.1f} s)", flush=True)
        except (Failed, AssertionError) as problem:
            failed += 1
            print(f"FAIL {t.__name__}: {problem}", flush=True)
    sys.exit(1 if failed else 0)
