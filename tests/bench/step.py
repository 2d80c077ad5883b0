# SPDX-License-Identifier: Apache-2.0
"""Seconds of a training step of GPT-2 124M on this machine, with all its cores.

fp32, AdamW, gradient clipping, 4 sequences of 64 and of 256 tokens a step in micro-batches of 2, random tokens:
  floor     the step's matrix products alone, by the fastest of the libraries and splits that tests/bench/floor.c has
  single    1 shard service and 1 worker with all cores
  mesh      2 shard services and 2 workers with half of the cores each
  --peers   PyTorch eager and compiled in one process, FSDP2 and DeepSpeed ZeRO-3 over gloo in two, same batch

Everything is measured in turn, round by round, so that what else the machine does meets all. A figure is the median
over the rounds of a run's median after its warm-up steps. gloo's collectives on a CPU are not what the distributed
peers are made for.
"""
import argparse
import json
import os
import statistics
import sys

import measure

PEERS = ("eager", "compiled", "fsdp2", "deepspeed")
PEER_TITLES = {"eager": "PyTorch eager, 1 process", "compiled": "PyTorch compiled, 1 process",
               "fsdp2": "FSDP2 gloo, 2 processes", "deepspeed": "DeepSpeed ZeRO-3 gloo, 2 processes"}
PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "safetensors")
VENV = measure.ROOT / "build/peers/venv"
FLOOR_AGAIN = 3  # so many of the fastest ways of the first round are measured in the others


# ----------------------------------------------------------------------------- what is measured

def run_floor(way, length):
    out = measure.command([measure.BIN / "floor", *way, length, 3])
    return statistics.median(json.loads(out)["seconds"])


def floor_round(length, floors):
    """floors: way -> seconds of the rounds so far."""
    ways = [(library, split) for library in ("dnnl", "openblas") for split in ("own", "coarse", "medium", "fine")]
    if floors:
        ways = sorted(floors, key=lambda w: statistics.median(floors[w]))[:FLOOR_AGAIN]
    failed = None
    for way in ways:
        try:
            floors.setdefault(way, []).append(run_floor(way, length))
        except measure.Failed as failure:  # a library that is not there
            floors.pop(way, None)
            failed = failure
    if not floors:
        raise failed


def peers_open():
    """None, or why no peer can run."""
    python = VENV / "bin/python"
    try:
        if not python.exists():
            measure.command([sys.executable, "-m", "venv", VENV])
        probe = f"import importlib.util as u; print(*[p for p in {PACKAGES!r} if not u.find_spec(p)])"
        missing = measure.command([python, "-c", probe]).split()
        if missing:
            measure.say(f"installing {' '.join(missing)} into {VENV} (about 5 GB in all)")
            measure.command([python, "-m", "pip", "install", "--quiet", *missing])
    except (measure.Failed, OSError) as failure:
        return f"its virtual environment cannot be made: {failure}"
    return None


def run_peer(peer, length):
    processes = 2 if peer in ("fsdp2", "deepspeed") else 1
    # Ninja, for what they compile, is in the virtual environment.
    env = dict(os.environ, OMP_NUM_THREADS=str(max(1, measure.CORES // processes)),
               PATH=f"{VENV / 'bin'}:{os.environ['PATH']}", TOKENIZERS_PARALLELISM="false")
    argv = [VENV / "bin/python"]
    if processes > 1:
        argv += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    argv += [measure.ROOT / "tests/bench/peers.py", peer, length, measure.WARM_UP, measure.COUNTED, measure.data_file()]
    lines = [line for line in measure.command(argv, env).splitlines() if line.startswith('{"seconds"')]
    return statistics.median(json.loads(lines[-1])["seconds"])


def peers_round(length, peers, missing):
    for peer in PEERS:
        if peer in missing:
            continue
        try:
            peers.setdefault(peer, []).append(run_peer(peer, length))
        except measure.Failed as failure:
            missing[peer] = str(failure)
            peers.pop(peer, None)
            measure.say(f"{PEER_TITLES[peer]}: {failure}")


def run_where(length):
    config = measure.write_job(f"where-{length}", length, 1, 1, measure.CORES)
    return json.loads(measure.command([measure.BIN / "where", config, measure.COUNTED, measure.CORES]))


def measure_length(length, args, missing):
    floors, single, mesh, peers, waits = {}, [], [], {}, []
    for i in range(args.runs):
        measure.say(f"{length} tokens, round {i + 1} of {args.runs}")
        floor_round(length, floors)
        records = measure.run_mesh(length, 1, 1)
        single.append(measure.seconds(records))
        waits += records
        mesh.append(measure.seconds(measure.run_mesh(length, 2, 2)))
        if args.peers:
            peers_round(length, peers, missing)
    best = min(floors, key=lambda w: statistics.median(floors[w]))
    result = {
        "sequence_length": length,
        "floor_seconds": statistics.median(floors[best]),
        "single_seconds": statistics.median(single),
        "mesh_seconds": statistics.median(mesh),
        "peers": {peer: statistics.median(s) for peer, s in peers.items()},
        "peers_missing": dict(missing),
        "floor_best": " ".join(best),
        "floor_ways": {" ".join(way): statistics.median(s) for way, s in floors.items()},
        "rounds": {"floor": floors[best], "single": single, "mesh": mesh, **peers},
    }
    if args.where:
        result["where"] = run_where(length)
        result["where"]["worker"] = {key: statistics.median(r[key] for r in waits) for key in (
            "step_seconds", "seconds_compute", "seconds_fetch", "seconds_push")}
    return result


# ----------------------------------------------------------------------------- what is printed

def targets(r):
    """(what, ratio, sign, wanted), for what was measured."""
    short, peers = r["sequence_length"] == 64, r["peers"]
    out = [("single / floor", r["single_seconds"] / r["floor_seconds"], "<=", 1.25 if short else 1.12),
           ("mesh / single", r["mesh_seconds"] / r["single_seconds"], "<=", 1.05)]
    one = [peers[p] for p in ("eager", "compiled") if p in peers]
    if one:
        out.append(("best PyTorch / single", min(one) / r["single_seconds"], ">=", 1.35 if short else 1.0))
    if "fsdp2" in peers:
        out.append(("FSDP2 / mesh", peers["fsdp2"] / r["mesh_seconds"], ">=", 4.0 if short else 1.8))
    if "deepspeed" in peers and short:
        out.append(("DeepSpeed / mesh", peers["deepspeed"] / r["mesh_seconds"], ">=", 4.0))
    return out


def print_table(r):
    rounds = r["rounds"]
    print(f"\n{r['sequence_length']} tokens a sequence: seconds a step, median (best and worst round)")
    print(f"  {'floor: products by ' + r['floor_best']:38} {measure.spread(rounds['floor'])}")
    print(f"  {'single: 1 shard service, 1 worker':38} {measure.spread(rounds['single'])}")
    print(f"  {'mesh: 2 shard services, 2 workers':38} {measure.spread(rounds['mesh'])}")
    for peer in r["peers"]:
        print(f"  {PEER_TITLES[peer]:38} {measure.spread(rounds[peer])}")
    for peer, why in r["peers_missing"].items():
        print(f"  {PEER_TITLES[peer]:38} did not run: {why}")
    print(f"\n  {'ratio':38} {'is':>6}  target")
    for what, ratio, sign, wanted in targets(r):
        reached = ratio <= wanted if sign == "<=" else ratio >= wanted
        print(f"  {what:38} {ratio:6.2f}  {sign} {wanted:.2f}{'' if reached else '  missed'}")


def print_where(r):
    w = r["where"]
    print(f"\n{r['sequence_length']} tokens a sequence: the step by part, without the mesh, ms")
    print(f"  this machine: {w['fma_flops'] / 1e9:.0f} GFLOP/s of multiply-adds; copy {w['copy_bytes'] / 1e9:.0f}, "
          f"triad {w['triad_bytes'] / 1e9:.0f}, update in place {w['update_bytes'] / 1e9:.0f} GB/s")
    print(f"  {'part':24} {'takes':>8} {'allowed':>8}  by")
    for part in w["parts"]:
        print(f"  {part['name']:24} {part['seconds'] * 1e3:8.1f} {part['allowed_seconds'] * 1e3:8.1f}  {part['limit']}")
    parts = sum(part["seconds"] for part in w["parts"])
    print(f"  {'between the calls':24} {(w['step_seconds'] - parts) * 1e3:8.1f}")
    print(f"  {'the step, bare':24} {w['step_seconds'] * 1e3:8.1f}")
    products = sum(p["seconds"] for p in w["parts"] if p["name"].startswith(("products", "vocabulary")))
    print(f"  the products take {products / r['floor_seconds']:.2f} x the floor, {r['floor_seconds'] * 1e3:.1f} ms")
    s = w["worker"]
    outside = s["step_seconds"] - s["seconds_compute"] - s["seconds_fetch"] - s["seconds_push"]
    print("  the same step in the mesh, 1 shard service and 1 worker, ms")
    for name, value in (("computing", s["seconds_compute"]), ("wait for parameters", s["seconds_fetch"]),
                        ("wait for a buffer", s["seconds_push"]), ("between the spans", outside),
                        ("the step", s["step_seconds"])):
        print(f"  {name:24} {value * 1e3:8.1f}")


def main():
    parser = argparse.ArgumentParser(prog="step.sh", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also the peers, from build/peers/venv (5 GB from PyPI)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line for each sequence length")
    parser.add_argument("--where", action="store_true", help="also the step by part, beside what the machine allows")
    parser.add_argument("--runs", type=int, default=3, help="rounds (3)")
    args = parser.parse_args()
    measure.WORK.mkdir(parents=True, exist_ok=True)
    machine, missing = measure.machine(), {}
    why = peers_open() if args.peers else None
    if why:
        missing = dict.fromkeys(PEERS, why)
    if not args.json:
        print(measure.machine_text(machine))
        print(f"medians of {args.runs} rounds of {measure.COUNTED} steps after {measure.WARM_UP} to warm up")
    for length in measure.LENGTHS:
        result = measure_length(length, args, missing)
        if args.json:
            print(json.dumps({**result, "machine": machine}), flush=True)
            continue
        print_table(result)
        if args.where:
            print_where(result)
        sys.stdout.flush()


try:
    main()
except measure.Failed as failure:
    sys.exit(f"step.sh: {failure}")
