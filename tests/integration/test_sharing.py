# SPDX-License-Identifier: Apache-2.0
"""Workers of one host fetch a unit once: the same bits, each byte over the "network" once, and nobody depends on another.

The network is played by local-copy. What each worker read is in the last lines of its log.
"""
import os
import re
import signal
import subprocess
import time

from harness import bits, check, config, finish, lines, main, members, run, same_bits, start, wait_for

STEPS = 12
# Units of several portions.
WIDE = {"model_type": "gpt2", "vocab_size": 1024, "n_positions": 64, "n_embd": 192, "n_layer": 2, "n_head": 4}
# The smallest window; nothing is kept, nothing is read ahead.
TIGHT = {"zero_optimization__stage3_max_live_parameters": 1, "zero_optimization__stage3_prefetch_bucket_size": 1,
         "zero_optimization__stage3_max_reuse_distance": 0}
FIELDS = ("network", "neighbours", "claimed", "waited", "seized", "seized_bytes")


def job(directory, name, *flags, steps=STEPS, **changes):
    path = config(directory, steps=steps, eval_interval=0, eval_batches=0, model=WIDE, **changes)
    return [path, "--run-dir", directory / name, *flags]


def shared(directory, name):
    """What the workers that came to their end say of sharing, one dictionary each."""
    out = []
    for log in (directory / name / "log").glob("worker-*.log"):
        said = re.search(r"sharing: (\d+) \D*(\d+) \D*(\d+) \D*(\d+) \D*(\d+) \D*(\d+)", log.read_text())
        if said:
            out.append(dict(zip(FIELDS, map(int, said.groups()))))
    return out


def total(said, field):
    return sum(s[field] for s in said)


def plain(directory):
    run(*job(directory, "want", "--workers", 1, "--shards", 1, "--fabric", "local"))
    return bits(directory / "want", STEPS)


def parameters(directory, want):
    """Their bytes: what one worker reads of each version."""
    run(*job(directory, "alone", "--workers", 1, "--shards", 2, "--fabric", "local-copy"))
    same_bits("alone", bits(directory / "alone", STEPS), want)
    alone, = shared(directory, "alone")
    check(alone["neighbours"] == 0 and alone["network"] % STEPS == 0, alone)
    return alone["network"] // STEPS


def once(directory):
    """Windows that hold the model: a host reads each version once, whatever the number of workers."""
    want = plain(directory)
    model = parameters(directory, want)
    for shards in (1, 2):
        for workers in (2, 3):
            name = f"s{shards}w{workers}"
            run(*job(directory, name, "--shards", shards, "--workers", workers, "--fabric", "local-copy"))
            same_bits(name, bits(directory / name, STEPS), want)
            said = shared(directory, name)
            check(len(said) == workers, f"{name}: {len(said)} workers said what they read")
            # The first version may be there before the neighbours know each other.
            read = total(said, "network") - total(said, "seized_bytes")
            check(STEPS * model <= read <= (STEPS + workers - 1) * model, f"{name}: {read} of {model} a step: {said}")
            check(total(said, "neighbours") > 0 and total(said, "claimed") > STEPS, f"{name}: {said}")
    run(*job(directory, "off", "--workers", 3, "--shards", 2, "--fabric", "local-copy", host_sharing=False))
    same_bits("off", bits(directory / "off", STEPS), want)
    said = shared(directory, "off")
    check(total(said, "network") == 3 * STEPS * model and total(said, "neighbours") == 0, f"off: {said}")


def windows(directory):
    """Units give way while neighbours copy them: the same bits, and never more than without neighbours."""
    want = plain(directory)
    model = parameters(directory, want)
    run(*job(directory, "tight-alone", "--workers", 1, "--fabric", "local-copy", **TIGHT))
    alone, = shared(directory, "tight-alone")
    check(alone["network"] > STEPS * model, f"the window holds everything: {alone}")
    for workers in (2, 3):
        name = f"w{workers}"
        run(*job(directory, name, "--workers", workers, "--fabric", "local-copy", **TIGHT))
        same_bits(name, bits(directory / name, STEPS), want)
        said = shared(directory, name)
        check(total(said, "network") < workers * alone["network"] and total(said, "neighbours") > 0, f"{name}: {said}")


def reader_killed(directory):
    """kill -9 of a worker that reads for the others."""
    want = plain(directory)
    for i, delay in enumerate((0.0, 0.007, 0.015, 0.023)):
        process = start(*job(directory, f"run{i}", "--workers", 3, "--fabric", "local-copy", **(TIGHT if i % 2 else {})))
        wait_for(lambda: lines(directory / f"run{i}") >= 3, "step 3")
        time.sleep(delay)
        os.kill(members(process, "worker")[i % 3], signal.SIGKILL)
        code, out = finish(process)
        check(code == 0 and "killed by signal 9" in out, f"exited with {code}:\n{out}")
        same_bits(f"killed after {delay} s", bits(directory / f"run{i}", STEPS), want)
        check(len(shared(directory, f"run{i}")) == 2, "not two workers said what they read")


def reader_halted(directory):
    """A worker that is stopped for a moment, again and again: what it claimed others read; the same bits."""
    want = plain(directory)
    process = start(*job(directory, "run", "--workers", 3, "--fabric", "local-copy", **TIGHT))
    wait_for(lambda: lines(directory / "run") >= 2, "step 2")
    victims = members(process, "worker")
    for i in range(4):
        os.kill(victims[i % 3], signal.SIGSTOP)
        time.sleep(0.3)
        os.kill(victims[i % 3], signal.SIGCONT)
        time.sleep(0.02)
        if process.poll() is not None:
            break
    code, out = finish(process)
    check(code == 0, f"exited with {code}:\n{out}")
    same_bits("halted", bits(directory / "run", STEPS), want)


def reader_evicted(directory):
    """One that stays stopped is evicted, and wakes up to find that nobody waits for it."""
    want = plain(directory)
    process = start(*job(directory, "run", "--workers", 3, "--fabric", "local-copy"))
    wait_for(lambda: lines(directory / "run") >= 2, "step 2")
    victim = members(process, "worker")[0]
    os.kill(victim, signal.SIGSTOP)
    wait_for(lambda: process.poll() is not None or lines(directory / "run") >= STEPS - 2, "the others to go on", 40)
    subprocess.run(["kill", "-CONT", str(victim)], stderr=subprocess.DEVNULL)
    code, out = finish(process, 40)
    check(code == 0, f"exited with {code}:\n{out}")
    same_bits("evicted", bits(directory / "run", STEPS), want)


main([once, windows, reader_killed, reader_halted, reader_evicted])
