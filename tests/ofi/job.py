# SPDX-License-Identifier: Apache-2.0
"""job.py NAME NAMESPACE NAMESPACE: one job of run.sh between two namespaces, with what happens to the link meanwhile."""
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "integration"))
from harness import BIN, bits, check, clean_environment, config, lines, main, run, same_bits, wait_for  # noqa: E402

NETS = []
PORT = 29400
SERVICE_PORT = 29401
STEPS = 40


def inside(net, *command):
    return ["ip", "netns", "exec", net, *map(str, command)]


def members(directory, path):
    token = directory / "token"
    token.write_text(os.urandom(32).hex())
    token.chmod(0o600)
    link = ["--rdzv-endpoint", f"10.77.0.1:{PORT}", "--rdzv-id", "net"]
    commands = [inside(NETS[0], BIN / "meshctl", "coordinator", "--config", path, "--run-dir", directory / "net",
                       "--rdzv-id", "net", "--listen", f"10.77.0.1:{PORT}")]
    for i, net in enumerate(NETS):
        commands.append(inside(net, BIN / "shardsvc", *link, "--fabric", "ofi",
                               "--listen", f"10.77.0.{i + 1}:{SERVICE_PORT}"))
        commands.append(inside(net, BIN / "worker", *link, "--fabric", "ofi"))
    env = clean_environment(SHARDMESH_TOKEN_FILE=str(token))
    started = []
    for i, command in enumerate(commands):
        with open(directory / f"member-{i}.log", "w") as log:
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    return started


def job(directory, happening=None, seconds=90):
    """The job over the link, while `happening(run_dir)` happens; what the members said."""
    path = config(directory, steps=STEPS, eval_interval=0, eval_batches=0)
    run(path, "--run-dir", directory / "local", "--fabric", "local")
    started = members(directory, path)
    over = threading.Event()
    trouble = threading.Thread(target=happening or (lambda _run_dir, _over: None), args=(directory / "net", over))
    trouble.start()
    try:
        wait_for(lambda: all(p.poll() is not None for p in started), "the members to end", seconds)
    finally:
        over.set()
        trouble.join()
        for p in started:
            p.kill()
        said = [(directory / f"member-{i}.log").read_text() for i in range(len(started))]
    for p, text in zip(started, said):
        check(p.returncode == 0, f"{p.args[4]} exited with {p.returncode}:\n{text}")
    same_bits("over the link", bits(directory / "net", STEPS), bits(directory / "local", STEPS))
    return "".join(said)


def bare(directory):
    """The bytes go over the link, not around it."""
    before = sent()
    job(directory)
    with open(directory / "net/steps.jsonl") as f:
        workers = {json.loads(line)["workers"] for line in f}
    check(workers == {2}, f"steps with {workers} workers")
    # The parameters and the gradients of every step, at least once each.
    check(sent() - before > STEPS * 100000, f"{sent() - before} bytes went over the link")


def sent():
    said = subprocess.run(["ip", "-n", NETS[0], "-s", "-j", "link", "show", "link0"], check=True, capture_output=True)
    return json.loads(said.stdout)[0]["stats64"]["tx"]["bytes"]


def slow(directory):
    job(directory)


def loss(directory):
    job(directory, seconds=150)


def link_down(directory):
    """Two seconds without a link, in the middle."""
    def pull(run_dir, over):
        while lines(run_dir) < 5 and not over.is_set():
            time.sleep(0.01)
        subprocess.run(["ip", "-n", NETS[0], "link", "set", "link0", "down"], check=True)
        time.sleep(2)
        subprocess.run(["ip", "-n", NETS[0], "link", "set", "link0", "up"], check=True)
    job(directory, pull, 120)


def resets(directory):
    """Every packet of the fabric is answered by a reset for a moment, again and again; the control plane stands."""
    def filter_in(change, *rule):
        subprocess.run(inside(NETS[1], "iptables", change, "INPUT", "-i", "link0", "-p", "tcp", *rule), check=True)

    def reset(run_dir, over):
        for at in (5, 15, 25):
            while lines(run_dir) < at and not over.is_set():
                time.sleep(0.005)
            filter_in("-A", "-j", "REJECT", "--reject-with", "tcp-reset")
            time.sleep(0.1)
            filter_in("-D", "-j", "REJECT", "--reject-with", "tcp-reset")

    for port in (PORT, SERVICE_PORT):
        for end in ("--dport", "--sport"):
            filter_in("-A", end, str(port), "-j", "ACCEPT")
    said = job(directory, reset, 120)
    check("built again" in said and "stands again" in said, f"no connection broke:\n{said}")


if __name__ == "__main__":
    NETS.extend(sys.argv[2:])
    del sys.argv[2:]
    main([bare, slow, loss, link_down, resets])
