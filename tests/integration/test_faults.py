# SPDX-License-Identifier: Apache-2.0
"""Who may die and what happens then; Ctrl-C; what is left behind."""
import json
import os
import pathlib
import signal
import subprocess
import time

from harness import BIN, bits, check, children, clean_environment, config, finish, lines, members, run, same_bits, start, wait_for

STEPS = 100


def job(directory, *flags, steps=STEPS, **changes):
    path = config(directory, steps=steps, eval_interval=0, eval_batches=0, **changes)
    return start(path, "--run-dir", directory / "run", *flags)


def after_steps(directory, n):
    wait_for(lambda: lines(directory / "run") >= n, f"step {n}")


def outside(directory):
    """Everything a job could leave outside its run directory."""
    shm = set(os.listdir("/dev/shm"))
    tmp = {n for n in os.listdir("/tmp") if "shardmesh" in n and not n.startswith("shardmesh-test-")}
    sockets = {line.split()[-1] for line in pathlib.Path("/proc/net/unix").read_text().splitlines() if "shardmesh" in line}
    beside = {p.name for p in directory.iterdir()} - {"run", "text.txt", "job.json"}
    return shm, tmp, sockets, beside


def worker_killed(directory):
    """kill -9 of a worker, at several moments: its spans are leased again, same bits."""
    run(config(directory, steps=STEPS, eval_interval=0, eval_batches=0), "--run-dir", directory / "want")
    want = bits(directory / "want", STEPS)
    for delay, fabric in ((0.0, "local"), (0.013, "local"), (0.03, "local-copy"), (0.05, "local-copy")):
        process = job(directory, "--workers", 3, "--fabric", fabric)
        after_steps(directory, 5)
        time.sleep(delay)
        os.kill(members(process, "worker")[1], signal.SIGKILL)
        code, out = finish(process)
        check(code == 0, f"exited with {code}:\n{out}")
        check("killed by signal 9" in out, f"nobody says that a worker died:\n{out}")
        same_bits(f"worker killed after {delay} s, {fabric}", bits(directory / "run", STEPS), want)
        workers = [json.loads(line)["workers"] for line in (directory / "run/steps.jsonl").open()]
        check(workers[0] == 3 and workers[-1] == 2, f"workers in steps.jsonl: {workers}")
        subprocess.run(["rm", "-rf", directory / "run"], check=True)


def worker_joins(directory):
    """A worker started by hand in the middle of a run takes part; same bits."""
    run(config(directory, steps=STEPS, eval_interval=0, eval_batches=0), "--run-dir", directory / "want")
    process = job(directory, "--workers", 1, "--rdzv-id", "joined")
    after_steps(directory, 3)
    endpoint = (directory / "run/endpoint").read_text().strip()
    joined = subprocess.Popen([BIN / "worker", "--rdzv-endpoint", endpoint, "--rdzv-id", "joined"],
                              env=clean_environment(SHARDMESH_TOKEN_FILE=str(directory / "run/token")),
                              stderr=subprocess.DEVNULL)
    code, out = finish(process)
    joined_code = joined.wait(10)
    check(code == 0 and joined_code == 0, f"exited with {code} and {joined_code}:\n{out}")
    same_bits("joined", bits(directory / "run", STEPS), bits(directory / "want", STEPS))
    workers = [json.loads(line)["workers"] for line in (directory / "run/steps.jsonl").open()]
    check(workers[0] == 1 and workers[-1] == 2, f"workers in steps.jsonl: {workers}")


def ends_within_3_seconds(directory, victim, says):
    before = outside(directory)
    process = job(directory, "--workers", 1 if victim == "worker" else 2, steps=100000)
    after_steps(directory, 3)
    everyone = children(process.pid)
    check(len(everyone) >= 4, f"expected a coordinator, shard services and workers: {everyone}")
    pid = process.pid if victim == "meshctl" else members(process, victim)[0]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    code, out = finish(process, 10)
    while any(pathlib.Path(f"/proc/{p}").exists() and "\nState:\tZ" not in pathlib.Path(f"/proc/{p}/status").read_text()
              for p in everyone if pathlib.Path(f"/proc/{p}").exists()):
        check(time.monotonic() - killed < 10, "processes are left")
        time.sleep(0.02)
    took = time.monotonic() - killed
    limit = 3 * float(os.environ.get("SHARDMESH_TEST_SLOW", "1"))
    check(took < limit, f"took {took:.1f} s to end")
    if victim != "meshctl":
        check(code == 1, f"exit code {code}, expected 1:\n{out}")
    for words in says:
        check(words in out, f"'{words}' is not said:\n{out}")
    after = outside(directory)
    check(before == after, f"left outside the run directory: {[a - b for a, b in zip(after, before)]}")


def coordinator_killed(directory):
    ends_within_3_seconds(directory, "coordinator", ["coordinator was killed by signal 9"])


def shard_killed(directory):
    ends_within_3_seconds(directory, "shardsvc", ["was killed by signal 9", "shard service"])


def last_worker_killed(directory):
    ends_within_3_seconds(directory, "worker", ["was killed by signal 9", "worker"])


def meshctl_killed(directory):
    ends_within_3_seconds(directory, "meshctl", [])


def ctrl_c(directory):
    """Once: the step is finished and the model written, exit 130."""
    process = job(directory, steps=100000)
    after_steps(directory, 3)
    os.killpg(process.pid, signal.SIGINT)
    code, out = finish(process, 20)
    check(code == 130, f"exit code {code}, expected 130:\n{out}")
    check((directory / "run/model/model.safetensors").exists(), f"no model was written:\n{out}")
    check(not children(process.pid), "processes are left")


def ctrl_c_twice(directory):
    process = job(directory, steps=100000)
    after_steps(directory, 3)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    code, out = finish(process, 5)
    check(code == 130, f"exit code {code}, expected 130:\n{out}")


def stopped_worker(directory):
    """A worker that is alive but stopped is evicted by its heartbeat; the others finish, same bits."""
    run(config(directory, steps=STEPS, eval_interval=0, eval_batches=0), "--run-dir", directory / "want")
    process = job(directory, "--workers", 3)
    after_steps(directory, 3)
    victim = members(process, "worker")[0]
    os.kill(victim, signal.SIGSTOP)
    code, out = finish(process, 40)
    check(code == 0, f"exited with {code}:\n{out}")
    same_bits("stopped worker", bits(directory / "run", STEPS), bits(directory / "want", STEPS))


def status(directory):
    """Every member and every wait has a name."""
    process = job(directory, steps=100000)
    after_steps(directory, 2)
    victim = members(process, "worker")[0]
    os.kill(victim, signal.SIGSTOP)
    time.sleep(1.5)
    out = subprocess.run([BIN / "meshctl", "status", "--json", "--run-dir", directory / "run"], capture_output=True,
                         text=True, env=clean_environment(), check=True).stdout
    text = subprocess.run([BIN / "meshctl", "status", "--run-dir", directory / "run"], capture_output=True, text=True,
                          env=clean_environment(), check=True).stdout
    s = json.loads(out)
    check(len(s["members"]) == 4, f"members: {s['members']}")
    check(sorted(m["role"] for m in s["members"]) == ["shard", "shard", "worker", "worker"], out)
    check("worker" in s["waiting_for"], f"waiting_for: {s['waiting_for']}")
    check(any(m["waits"] for m in s["members"]), f"nobody waits, though a worker is stopped:\n{out}")
    check("worker" in text and "shard" in text, text)
    os.kill(victim, signal.SIGCONT)
    stop = subprocess.run([BIN / "meshctl", "stop", "--run-dir", directory / "run"], env=clean_environment())
    check(stop.returncode == 0, f"meshctl stop exited with {stop.returncode}")
    code, out = finish(process, 20)
    check(code == 0, f"exited with {code} after meshctl stop:\n{out}")


def refusals(directory):
    """A used run directory; a wrong token."""
    path = config(directory, steps=2)
    run(path, "--run-dir", directory / "run")
    code, out = finish(start(path, "--run-dir", directory / "run"))
    check(code == 42 and "holds a job already" in out, f"exit {code}:\n{out}")
    process = job(directory, "--run-dir", directory / "other", "--rdzv-id", "real", steps=100000)
    wait_for(lambda: lines(directory / "other") >= 1, "step 1")
    endpoint = (directory / "other/endpoint").read_text().strip()
    wrong = subprocess.run([BIN / "worker", "--rdzv-endpoint", endpoint, "--rdzv-id", "real"], capture_output=True,
                           text=True, env=clean_environment(SHARDMESH_TOKEN="x" * 32), timeout=30)
    check(wrong.returncode not in (0, -9) and "token" in wrong.stderr, f"{wrong.returncode}: {wrong.stderr}")
    check(process.poll() is None, "the job ended because of a stranger")
    process.send_signal(signal.SIGINT)
    finish(process, 20)


if __name__ == "__main__":
    from harness import main
    main([worker_killed, worker_joins, coordinator_killed, shard_killed, last_worker_killed, meshctl_killed, ctrl_c,
          ctrl_c_twice, stopped_worker, status, refusals])
