# SPDX-License-Identifier: Apache-2.0
"""The mesh's tax: a step through 1 shard service and 1 worker against the same kernels in a bare loop.

Both compute with all cores and alternate, so that what else the machine does meets both. Loss and gradient norm must
agree to the last bit, which shows that it is the same work.
"""
import argparse
import statistics
import sys

import measure

TARGET = {64: 5.0, 256: 3.0}  # percent


def compare(length, runs):
    """(bare seconds, mesh seconds) of each round."""
    pairs = []
    for i in range(runs):
        bare, mesh = measure.run_bare(length), measure.run_mesh(length, 1, 1)
        for b, m in zip(bare, mesh, strict=True):
            for key in ("step", "loss", "grad_norm"):
                if b[key] != m[key]:
                    what = f"{length} tokens, step {b['step']}: {key}"
                    raise measure.Failed(f"{what} is {b[key]} bare, {m[key]} in the mesh")
        pairs.append((measure.seconds(bare), measure.seconds(mesh)))
        measure.say(f"{length} tokens, round {i + 1} of {runs}: bare {pairs[-1][0]:.3f} s, mesh {pairs[-1][1]:.3f} s")
    return pairs


def main():
    parser = argparse.ArgumentParser(prog="overhead.sh", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="rounds, each of both (5)")
    runs = parser.parse_args().runs
    measure.WORK.mkdir(parents=True, exist_ok=True)
    print(measure.machine_text(measure.machine()))
    print(f"medians of {runs} rounds of {measure.COUNTED} steps; in brackets the best and the worst round")
    print("tokens  bare loop, s         mesh 1+1, s          tax, %                target, %")
    for length in measure.LENGTHS:
        pairs = compare(length, runs)
        bare, mesh = [p[0] for p in pairs], [p[1] for p in pairs]
        taxes = [(m / b - 1) * 100 for b, m in pairs]
        tax = (statistics.median(mesh) / statistics.median(bare) - 1) * 100
        print(f"{length:6}  {measure.spread(bare):20} {measure.spread(mesh):20} "
              f"{f'{tax:.1f} ({min(taxes):.1f} to {max(taxes):.1f})':21} <= {TARGET[length]:.0f}", flush=True)


try:
    main()
except measure.Failed as failure:
    sys.exit(f"overhead.sh: {failure}")
