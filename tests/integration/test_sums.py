# SPDX-License-Identifier: Apache-2.0
"""Workers of one host add their gradients before they push them: the same bits, one sum a host, and nobody is believed.

The network is played by local-copy. What each worker pushed is in the last lines of its log. Workers wait for each
other here for as long as it takes, unless a case is about that: how busy this machine is must not matter.
"""
import json
import os
import re
import signal
import subprocess
import time

from harness import bits, check, config, finish, lines, main, members, run, same_bits, start, wait_for

STEPS = 10
MODEL = {"model_type": "gpt2", "vocab_size": 2048, "n_positions": 64, "n_embd": 128, "n_layer": 3, "n_head": 4}
FIELDS = ("pushed", "taken", "given", "alone", "lost")
PATIENT = 30000


def job(directory, name, n_micro, *flags, steps=STEPS, wait=PATIENT, **changes):
    path = config(directory, steps=steps, eval_interval=0, eval_batches=0, model=MODEL, host_wait_ms=wait, **changes)
    c = json.loads(path.read_text())
    c["train_batch_size"] = n_micro * c["train_micro_batch_size_per_gpu"]
    path.write_text(json.dumps(c))
    return [path, "--run-dir", directory / name, *flags]


def sums(directory, name):
    """What the workers that came to their end say, summed."""
    total = dict.fromkeys(FIELDS, 0)
    for log in (directory / name / "log").glob("worker-*.log"):
        said = re.search(r"sums: (\d+) \D*(\d+) \D*(\d+) \D*(\d+) \D*(\d+)", log.read_text())
        if said:
            for field, value in zip(FIELDS, map(int, said.groups())):
                total[field] += value
    return total


def plain(directory, n_micro, steps=STEPS):
    """The bits, from one worker whose memory is used in place."""
    name = f"want{n_micro}"
    run(*job(directory, name, n_micro, "--workers", 1, "--shards", 1, "--fabric", "local", steps=steps))
    return bits(directory / name, steps)


def roots(directory):
    """Four micro-batches: one sum of the whole step is pushed, however many workers computed it."""
    want = plain(directory, 4)
    run(*job(directory, "alone", 4, "--workers", 1, "--shards", 1, "--fabric", "local-copy"))
    gradient = sums(directory, "alone")["pushed"] // STEPS
    check(gradient > 0, "nothing was pushed")
    for shards in (1, 2):
        for workers in (2, 4):
            name = f"s{shards}w{workers}"
            run(*job(directory, name, 4, "--workers", workers, "--shards", shards, "--fabric", "local-copy"))
            same_bits(name, bits(directory / name, STEPS), want)
            said = sums(directory, name)
            # In the first steps the neighbours may not know each other yet.
            check(STEPS * gradient <= said["pushed"] <= (STEPS + 2 * (workers - 1)) * gradient,
                  f"{name}: {said} of {gradient} a step")
            check(said["taken"] == said["given"] and said["taken"] >= (STEPS - 2) * (workers - 1) * 5, f"{name}: {said}")
            check(said["lost"] == 0, f"{name}: {said}")


def odd(directory):
    """Trees that are not full, and several spans a worker: sums meet where they can."""
    for n_micro in (6, 12):
        want = plain(directory, n_micro)
        for shards in (1, 2):
            for workers in (2, 4):
                name = f"m{n_micro}s{shards}w{workers}"
                run(*job(directory, name, n_micro, "--workers", workers, "--shards", shards, "--fabric", "local-copy",
                         wait=20))
                same_bits(name, bits(directory / name, STEPS), want)
                said = sums(directory, name)
                check(said["taken"] == said["given"] > 0 and said["lost"] == 0, f"{name}: {said}")


def switched_off(directory):
    """Nothing is added where the config says so, and none waited for with a patience of 0."""
    want = plain(directory, 4)
    run(*job(directory, "off", 4, "--workers", 4, "--fabric", "local-copy", host_sharing=False))
    run(*job(directory, "zero", 4, "--workers", 4, "--fabric", "local-copy", wait=0))
    for name in ("off", "zero"):
        same_bits(name, bits(directory / name, STEPS), want)
    check(sums(directory, "off")["taken"] == 0, "gradients were added though the config says no")
    check(sums(directory, "zero")["lost"] == 0, "spans were lost")


def killed(directory):
    """kill -9 of a worker that others wait for, or that has their gradients; memory for few sums makes recalls."""
    steps = 16
    want = plain(directory, 12, steps)
    for i, delay in enumerate((0.0, 0.005, 0.011, 0.017, 0.023, 0.031)):
        more = {"max_held_nodes": 1} if i % 2 else {}
        process = start(*job(directory, f"run{i}", 12, "--workers", 4, "--fabric", "local-copy", steps=steps, **more))
        wait_for(lambda: lines(directory / f"run{i}") >= 2, "step 2")
        time.sleep(delay)
        os.kill(members(process, "worker")[i % 4], signal.SIGKILL)
        code, out = finish(process)
        check(code == 0 and "killed by signal 9" in out, f"exited with {code}:\n{out}")
        same_bits(f"killed after {delay} s", bits(directory / f"run{i}", steps), want)


def halted(directory):
    """Workers that are stopped for a moment, one after the other: nobody waits for longer than the config says."""
    steps = 16
    want = plain(directory, 4, steps)
    process = start(*job(directory, "run", 4, "--workers", 4, "--fabric", "local-copy", steps=steps, wait=20))
    wait_for(lambda: lines(directory / "run") >= 2, "step 2")
    victims = members(process, "worker")
    for i in range(6):
        if process.poll() is not None:
            break
        os.kill(victims[i % 4], signal.SIGSTOP)
        time.sleep(0.2)
        os.kill(victims[i % 4], signal.SIGCONT)
        time.sleep(0.01 + 0.003 * i)
    code, out = finish(process)
    check(code == 0, f"exited with {code}:\n{out}")
    same_bits("halted", bits(directory / "run", steps), want)


def evicted(directory):
    """Stopped in the middle of a conversation, for good: the others compute again what it had, and do not hear it."""
    steps = 16
    want = plain(directory, 4, steps)
    for i in (0, 2):
        name = f"run{i}"
        process = start(*job(directory, name, 4, "--workers", 4, "--fabric", "local-copy", steps=steps))
        wait_for(lambda: lines(directory / name) >= 2, "step 2")
        victim = members(process, "worker")[i]
        os.kill(victim, signal.SIGSTOP)
        wait_for(lambda: process.poll() is not None or lines(directory / name) >= steps - 4, "the others to go on", 40)
        subprocess.run(["kill", "-CONT", str(victim)], stderr=subprocess.DEVNULL, check=False)
        code, out = finish(process, 40)
        check(code == 0, f"exited with {code}:\n{out}")
        same_bits("evicted", bits(directory / name, steps), want)


main([roots, odd, switched_off, killed, halted, evicted])
