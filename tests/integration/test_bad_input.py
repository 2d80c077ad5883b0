# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear message that names the file, the key or the member, and the exit code that scripts rely on."""
import json
import os
import pathlib
import resource
import signal
import socket
import struct
import subprocess
import time

from harness import BIN, check, clean_environment, config, finish, lines, main, members, run, start, wait_for


def expect(path, code, *words, flags=(), seconds=30, **popen):
    """meshctl run fails with the code, says all the words, and says what is wrong in one line."""
    process = subprocess.run([BIN / "meshctl", "run", "--config", path, *map(str, flags)], capture_output=True, text=True,
                             timeout=seconds * 8, env=clean_environment(), **popen)
    said = process.stdout + process.stderr
    check(process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{said}")
    for word in words:
        check(word in said, f"'{word}' is not said:\n{said}")
    check("Traceback" not in said and "assert" not in said.lower(), said)
    return said


def edit(directory, text, by):
    path = config(directory)
    content = path.read_text()
    check(text in content, f"the test is stale: {text} is not in the config")
    path.write_text(content.replace(text, by, 1))
    return path


def keys(directory):
    """A mistyped key, a wrong type, a duplicate, something that is not built."""
    expect(edit(directory, '"gradient_clipping"', '"gradient_cliping"'), 42, "job.json:", "gradient_cliping",
           "gradient_clipping")
    expect(edit(directory, '"eval_batches"', '"eval_batchs"'), 42, "job.json:", "eval_batches")
    expect(edit(directory, '"steps": 4', '"steps": "four"'), 42, "job.json:", "shardmesh.steps")
    expect(edit(directory, '"steps": 4', '"steps": 4, "steps": 5'), 42, "steps", "duplicate")
    expect(edit(directory, '"stage": 3', '"stage": 2'), 42, "zero_optimization.stage", "3")
    expect(edit(directory, '"type": "AdamW"', '"type": "Lamb"'), 42, "optimizer.type", "Lamb")
    expect(edit(directory, '"zero_optimization"', '"fp16": {"enabled": true}, "zero_optimization"'), 42, "fp16")
    expect(edit(directory, '"model_type": "gpt2"', '"model_type": "bloom"'), 42, "bloom")


def batches(directory):
    said = expect(edit(directory, '"train_batch_size": 24', '"train_batch_size": 25'), 42, "train_batch_size")
    check("25" in said and "2" in said, said)


def missing_files(directory):
    expect(edit(directory, "text.txt", "nowhere.txt"), 42, "shardmesh.data", "nowhere.txt", "No such file")
    expect(directory / "no.json", 42, "no.json", "No such file")
    expect(edit(directory, '"text.txt"', '"."'), 42, str(directory))


def short_data(directory):
    path = config(directory)
    (directory / "text.txt").write_text("too short")
    expect(path, 42, "shardmesh.data", "33")


def token_beyond_vocabulary(directory):
    tokens = [7] * 4000
    tokens[1234] = 300
    (directory / "tokens.bin").write_bytes(struct.pack("<4000H", *tokens))
    c = json.loads(config(directory).read_text())
    c["shardmesh"]["data"] |= {"train": "tokens.bin", "format": "nanogpt"}
    (directory / "job.json").write_text(json.dumps(c))
    expect(directory / "job.json", 42, "tokens.bin", "300", "1234", "256")


def too_large(directory):
    """Refused before anything is allocated, with the numbers."""
    path = edit(directory, '"n_embd": 64', '"n_embd": 65536')
    began = time.monotonic()
    expect(path, 42, "GiB")
    check(time.monotonic() - began < 20, "took long to refuse")
    check(not (directory / "run").exists(), "a run directory was made for a job that cannot start")


def port_in_use(directory):
    path = config(directory)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        env = clean_environment(SHARDMESH_TOKEN="x" * 32)
        p = subprocess.run([BIN / "meshctl", "coordinator", "--config", path, "--listen", f"127.0.0.1:{port}"],
                           capture_output=True, text=True, env=env, timeout=60)
    check(p.returncode == 1, f"exit code {p.returncode}: {p.stderr}")
    check(str(port) in p.stderr and "in use" in p.stderr, p.stderr)


def run_directories(directory):
    path = config(directory, steps=1)
    (directory / "file").write_text("")
    expect(path, 1, str(directory / "file"), flags=["--run-dir", directory / "file"])
    expect(path, 1, "/proc/shardmesh", flags=["--run-dir", "/proc/shardmesh"])
    run(path)
    said = expect(path, 42, "holds a job already", "--run-dir")
    check(str(directory / "run") in said, said)


def stale_lock(directory):
    """A lock whose holder is dead is no lock."""
    path = config(directory, steps=100000)
    process = start(path)
    wait_for(lambda: lines(directory / "run") >= 1, "step 1")
    coordinator = members(process, "coordinator")[0]
    os.kill(coordinator, signal.SIGKILL)
    finish(process)
    check((directory / "run/lock").exists(), "the test is stale: no lock file was left")
    path = config(directory, steps=1)
    env = clean_environment(SHARDMESH_TOKEN="x" * 32)
    for name in ("job.json", "steps.jsonl", "endpoint"):
        (directory / "run" / name).unlink(missing_ok=True)
    p = subprocess.Popen([BIN / "meshctl", "coordinator", "--config", path, "--listen", "127.0.0.1:0", "--run-dir",
                          directory / "run"], stderr=subprocess.PIPE, text=True, env=env)
    wait_for(lambda: (directory / "run/endpoint").exists() or p.poll() is not None, "the coordinator to listen")
    listens = p.poll() is None
    p.kill()
    check(listens, f"a stale lock keeps a coordinator out: {p.stderr.read()}")


def token_files(directory):
    path = config(directory)
    token = directory / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o644)
    for program in ([BIN / "worker", "--rdzv-endpoint", "127.0.0.1:1", "--rdzv-id", "x"], [BIN / "meshctl", "coordinator", "--config", path]):
        p = subprocess.run([*program, "--token-file", token], capture_output=True, text=True, env=clean_environment(),
                           timeout=30)
        check(p.returncode != 0 and str(token) in p.stderr and "chmod" in p.stderr, f"{p.returncode}: {p.stderr}")


def non_finite(directory):
    """A diverging job names the step."""
    c = json.loads(config(directory, optimizer__params__lr=1e30, steps=50).read_text())
    del c["scheduler"]
    path = directory / "job.json"
    path.write_text(json.dumps(c))
    expect(path, 1, "step", "not finite")


def full_disk(directory):
    """A full disk ends the job with its name; nothing hangs."""
    disk = directory / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        print("full_disk: skipped: mount is not allowed here")
        return
    try:
        path = config(directory, steps=3, model={"model_type": "gpt2", "vocab_size": 256, "n_positions": 64, "n_embd": 128,
                                                 "n_layer": 2, "n_head": 4})
        said = expect(path, 1, "No space left", flags=["--run-dir", disk / "run"])
        check("disk/run" in said, said)
    finally:
        subprocess.run(["umount", disk], check=True)


def no_descriptors(directory):
    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
    expect(config(directory), 1, "Too many open files", preexec_fn=few)


if __name__ == "__main__":
    main([keys, batches, missing_files, short_data, token_beyond_vocabulary, too_large, port_in_use, run_directories,
          stale_lock, token_files, non_finite, full_disk, no_descriptors])
