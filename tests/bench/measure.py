# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the job, its random data, running it through the mesh or bare, medians, the machine.

The job is GPT-2 124M in fp32 with AdamW and clipping, train_batch_size 4, micro-batch 2, no dropout, no evaluation.
"""
import datetime
import json
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = ROOT / "build/release/bin"
WORK = ROOT / "build/bench"
CORES = len(os.sched_getaffinity(0))
LENGTHS = (64, 256)
VOCAB = 50257
WARM_UP = 2
COUNTED = 5


class Failed(Exception):
    pass


# So that the children are ended, whichever way we are.
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def say(text):
    print(text, file=sys.stderr, flush=True)


def data_file():
    """Uniformly random tokens of the vocabulary, as nanoGPT writes them; the same ones every time."""
    path = WORK / "random.bin"
    tokens = 1 << 20
    if not path.exists() or path.stat().st_size != 2 * tokens:
        WORK.mkdir(parents=True, exist_ok=True)
        rng = random.Random(1)
        path.write_bytes(b"".join(rng.randrange(VOCAB).to_bytes(2, "little") for _ in range(tokens)))
    return path


def write_job(name, length, shards, workers, threads):
    """Writes the config of a job with so many threads in all its workers together; returns its path."""
    job = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 6e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        },
        "zero_optimization": {"stage": 3},
        "shardmesh": {
            "model": {
                "model_type": "gpt2", "vocab_size": VOCAB, "n_positions": 1024, "n_embd": 768, "n_layer": 12,
                "n_head": 12, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0,
            },
            "data": {"train": str(data_file()), "format": "nanogpt", "sequence_length": length},
            "steps": WARM_UP + COUNTED, "seed": 1, "eval_batches": 0, "shards": shards, "workers": workers,
            "threads_per_worker": max(1, threads // workers), "threads_per_shard": max(1, threads // shards),
            "run_dir": str(WORK / name),
        },
    }
    path = WORK / f"{name}.json"
    path.write_text(json.dumps(job, indent=1))
    return path


def command(argv, env=None, timeout=1800):
    """Its standard output; Failed with the end of what it said when it fails. Its children end with it."""
    argv = [str(a) for a in argv]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=WORK, env=env,
                          start_new_session=True) as child:
        try:
            out, err = child.communicate(timeout=timeout)
        except BaseException as failure:
            os.killpg(child.pid, signal.SIGKILL)
            if isinstance(failure, subprocess.TimeoutExpired):
                raise Failed(f"{' '.join(argv)}: not done after {timeout} s") from failure
            raise
    if child.returncode:
        tail = "\n".join((out + err).strip().splitlines()[-12:])
        raise Failed(f"{' '.join(argv)}: exit {child.returncode}\n{tail}")
    return out


def run_mesh(length, shards, workers):
    """The records of the counted steps."""
    name = f"mesh-{length}-{shards}x{workers}"
    config = write_job(name, length, shards, workers, CORES)
    directory = WORK / name
    shutil.rmtree(directory, ignore_errors=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("SHARDMESH_")}
    command([BIN / "meshctl", "run", "--config", config], env)
    lines = [json.loads(line) for line in (directory / "steps.jsonl").read_text().splitlines()]
    shutil.rmtree(directory)
    return lines[WARM_UP:]


def run_bare(length):
    """The records of the counted steps of the bare loop, whose config is that of one shard service and one worker."""
    config = write_job(f"bare-{length}", length, 1, 1, CORES)
    lines = command([BIN / "bare", config, WARM_UP + COUNTED, CORES]).splitlines()
    return [json.loads(line) for line in lines][WARM_UP:]


def seconds(records):
    return statistics.median(r["step_seconds"] for r in records)


def spread(values):
    """'0.731 (0.729-0.740)'"""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def _first(pattern, path):
    found = re.search(pattern, pathlib.Path(path).read_text(), re.MULTILINE)
    return found.group(1).strip() if found else "unknown"


def machine():
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True,
                         check=False)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git.stdout.strip() or "unknown",
        "processor": _first(r"^model name\s*: (.*)$", "/proc/cpuinfo"),
        "model": _first(r"^model\s*: (.*)$", "/proc/cpuinfo"),
        "cores": CORES,
        "memory_gib": round(int(_first(r"^MemTotal:\s*(\d+)", "/proc/meminfo")) / 2**20, 1),
        "kernel": os.uname().release,
        "load_before": round(os.getloadavg()[0], 2),
    }


def machine_text(m):
    return (f"{m['date']}, commit {m['commit']}; {m['processor']} (model {m['model']}), {m['cores']} cores, "
            f"{m['memory_gib']} GiB, Linux {m['kernel']}; load before {m['load_before']}")
