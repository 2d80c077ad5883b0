# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear message that names the file, the key or the member, and the exit code that scripts rely on."""
import json
import os
import pathlib
import re
import resource
import signal
import socket
import struct
import subprocess
import time

from harness import BIN, ROOT, check, clean_environment, config, finish, lines, main, members, run, start, wait_for


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


def as_somebody(directory):
    """How a process is started without root's right to read and write everything; None: it could not run the program."""
    if os.geteuid():
        return {}
    somebody = {"user": 65534, "group": 65534, "extra_groups": []}
    directory.chmod(0o777)
    try:
        subprocess.run([BIN / "meshctl", "--version"], check=True, capture_output=True, **somebody)
    except OSError:
        print(f"root alone may run {BIN}: rights to files are not tested")
        return None
    return somebody


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
    accumulation = '"train_batch_size": 24, "gradient_accumulation_steps": 5'
    expect(edit(directory, '"train_batch_size": 24', accumulation), 42, "24 != 2 * 5 * 2")
    path = edit(directory, '"train_micro_batch_size_per_gpu": 2,', "")
    expect(path, 42, "train_batch_size", "24", "5", flags=["--workers", 5])
    nothing_left(directory)


def flags(directory):
    """Numbers on the command line that no job can have, and no job at all."""
    path = config(directory)
    for flag, value, word in (("--shards", 0, "at least 1"), ("--workers", 0, "at least 1"), ("--steps", 0, "at least 1"),
                              ("--shards", 1025, "at most 1024"), ("--workers", 4097, "at most 4096")):
        expect(path, 42, f"{flag}: expected {word}", flags=[flag, value])
    expect(path, 2, "--steps", "'-1'", flags=["--steps", "-1"])
    for flags, code, word in (([], 2, "--run-dir"), (["--rdzv-endpoint", "127.0.0.1:1"], 2, "--rdzv-id"),
                              (["--run-dir", directory / "none"], 75, "is there a job")):
        for command in ("status", "stop"):
            p = subprocess.run([BIN / "meshctl", command, *flags], capture_output=True, text=True, env=clean_environment())
            check(p.returncode == code and word in p.stderr, f"{command}: exit code {p.returncode}: {p.stderr}")
    nothing_left(directory)


def missing_files(directory):
    expect(edit(directory, "text.txt", "nowhere.txt"), 42, "shardmesh.data", "nowhere.txt", "No such file")
    expect(directory / "no.json", 42, "no.json", "No such file")
    expect(edit(directory, '"text.txt"', '"."'), 42, str(directory))
    for key in ("model", "weights"):
        expect(config(directory, **{key: "nowhere"}), 42, f"shardmesh.{key}", str(directory / "nowhere"), "No such file")


def unreadable_files(directory):
    """What is there and cannot be read: no right to it, a pipe that nobody writes to, an empty file."""
    path = config(directory)
    text = directory / "text.txt"
    somebody = as_somebody(directory)
    if somebody is not None:
        for file, word in ((text, "shardmesh.data"), (path, "job.json")):
            file.chmod(0)
            expect(path, 42, word, str(file), "Permission denied", **somebody)
            file.chmod(0o644)
    text.unlink()
    os.mkfifo(text)
    expect(path, 42, "shardmesh.data", str(text), "regular file")
    text.unlink()
    text.write_bytes(b"")
    expect(path, 42, "shardmesh.data", str(text), "empty")
    nothing_left(directory)


def nothing_left(directory):
    check(not (directory / "run").exists(), "a run directory was made for a job that cannot start")


def short_data(directory):
    """The file is named, with what it has and what a sample takes; so is the one of several that is short."""
    path = config(directory)
    short = directory / "short.txt"
    short.write_text("too short")
    c = json.loads(path.read_text())
    for train in ("short.txt", ["text.txt", {"path": "short.txt"}]):
        c["shardmesh"]["data"] |= {"train": train, "validation_fraction": 0}
        c["shardmesh"]["eval_batches"] = 0
        path.write_text(json.dumps(c))
        expect(path, 42, "shardmesh.data", str(short), "9 tokens", "33")
    short.write_text("too short to hold any of it out")
    c["shardmesh"]["data"] |= {"train": "text.txt", "validation": "short.txt"}
    path.write_text(json.dumps(c))
    expect(path, 42, "shardmesh.data", str(short), "validation", "33")
    (directory / "short.jsonl").write_text('\n\n')
    del c["shardmesh"]["data"]["validation"]
    c["shardmesh"]["data"] |= {"train": "short.jsonl", "format": "jsonl"}
    path.write_text(json.dumps(c))
    expect(path, 42, "shardmesh.data", str(directory / "short.jsonl"), "no document")
    nothing_left(directory)


def jsonl_lines(directory):
    """A line that is no document is named by its number."""
    c = json.loads(config(directory).read_text())
    path, data = directory / "job.json", directory / "lines.jsonl"
    c["shardmesh"]["data"] |= {"train": "lines.jsonl", "format": "jsonl"}
    path.write_text(json.dumps(c))
    for line, words in [("{\"text\": \"a\"", "comma"), ("{\"prompt\": \"a\"}", "completion"), ("[1]", "object"),
                        ("{\"text\": 1}", "not a string"), ("[" * 5000, "object"), ("{\"x\": " + "[" * 5000, "too deep")]:
        data.write_text('{"text": "a good line"}\n' * 3 + line + "\n")
        expect(path, 42, f"{data}:4:", words)
    data.write_bytes(b'{"text": "\xff"}\n')
    expect(path, 42, f"{data}:1:", "UTF-8")
    nothing_left(directory)


def tokenizers(directory):
    """A tokenizer that is missing, broken, not supported, of no use, or beyond the model's vocabulary."""
    c = json.loads(config(directory).read_text())
    path, file = directory / "job.json", directory / "tokenizer.json"
    good = json.loads((ROOT / "tests/peers/tokenizers/gpt2.json").read_text())
    (directory / "lines.jsonl").write_text(json.dumps({"text": "a line that is long enough for a sample"}) + "\n")

    def refused(content, *words, **data):
        if content is not None:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        c["shardmesh"]["data"] = {"train": "lines.jsonl", "format": "jsonl", "sequence_length": 16,
                                  "tokenizer": "tokenizer.json", "end_token": "<|endoftext|>"} | data
        c["shardmesh"]["eval_batches"] = 0
        path.write_text(json.dumps(c))
        expect(path, 42, *words)

    refused(None, str(file), "No such file")
    refused("{", f"{file}:1:")
    refused(good | {"model": {"type": "Unigram", "vocab": []}}, str(file), "Unigram", "byte-level BPE")
    refused(good | {"normalizer": {"type": "Lowercase"}}, str(file), "Lowercase")
    refused(good | {"pre_tokenizer": {"type": "Metaspace"}}, str(file), "Metaspace")
    refused(good, str(directory / "lines.jsonl:1"), "vocab_size 256")
    refused(good, "end_token", "<|nothing|>", end_token="<|nothing|>")
    refused(good, "shardmesh.data.tokenizer", "text", format="bytes", train="text.txt")
    refused(good, "shardmesh.data.format", "needs shardmesh.data.tokenizer", format="text", tokenizer=None, end_token=None)
    nothing_left(directory)


def weights_at(directory, header, data=b"", name="model.safetensors", length=None):
    """A Hugging Face directory with one file of weights, bytes as given."""
    place = directory / "hostile"
    place.mkdir(exist_ok=True)
    raw = header.encode()
    (place / name).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return place


def hostile_weights(directory):
    """Headers and indices made to mislead: refused before anything starts, by the file's name."""
    path = config(directory)
    c = json.loads(path.read_text())
    c["shardmesh"]["weights"] = "hostile"
    path.write_text(json.dumps(c))
    file = directory / "hostile/model.safetensors"
    entry = '"%s":{"dtype":"F32","shape":[%s],"data_offsets":[%d,%d]}'
    cases = [
        (dict(header="{}", length=2**63), "header"),
        (dict(header="{}", length=100000001), "100000000"),
        (dict(header="[" * 100000), "depth"),
        (dict(header="{" + entry % ("a", "1", 0, 4) + "," + entry % ("a", "1", 0, 4) + "}", data=bytes(4)), "duplicate"),
        (dict(header="{" + entry % ("a", "9223372036854775807,4", 0, 4) + "}", data=bytes(4)), "overflows"),
        (dict(header="{" + entry % ("a", "2", 0, 8) + "," + entry % ("b", "2", 4, 12) + "}", data=bytes(12)), "overlap"),
        (dict(header="{" + entry % ("a", "1", 4, 8) + "}", data=bytes(8)), "hole"),
        (dict(header="{" + entry % ("a", "1", 0, 4) + "}", data=bytes(40)), "behind"),
        (dict(header="{" + entry % ("a", "4", 0, 16) + "}", data=bytes(14)), "cut short"),
        (dict(header="{" + entry % ("transformer.wte.weight", "1", 0, 4) + "}", data=bytes(4)), "256 x 64"),
    ]
    for case, word in cases:
        weights_at(directory, **case)
        expect(path, 42, "shardmesh.weights", str(file), word)
    file.write_bytes(bytes(7))
    expect(path, 42, "shardmesh.weights", str(file), "7 bytes are too few")
    file.unlink()
    index = directory / "hostile/model.safetensors.index.json"
    (directory / "outside.safetensors").write_bytes(b"")
    for name, word in [("../outside.safetensors", "paths are refused"), (str(directory / "outside.safetensors"), "paths"),
                       ("none.safetensors", "No such file")]:
        index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
        expect(path, 42, "shardmesh.weights", str(index), word)
    (directory / "hostile/link.safetensors").symlink_to(directory / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": "link.safetensors"}}))
    expect(path, 42, "shardmesh.weights", str(index), "symbolic link")
    index.write_text('{"weight_map": {"a": ')
    expect(path, 42, "shardmesh.weights", f"{index}:1:")
    index.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    expect(path, 42, "shardmesh.weights", str(index), "duplicate")
    nothing_left(directory)


def token_beyond_vocabulary(directory):
    tokens = [7] * 4000
    tokens[1234] = 300
    (directory / "tokens.bin").write_bytes(struct.pack("<4000H", *tokens))
    c = json.loads(config(directory).read_text())
    c["shardmesh"]["data"] |= {"train": "tokens.bin", "format": "nanogpt"}
    (directory / "job.json").write_text(json.dumps(c))
    expect(directory / "job.json", 42, str(directory / "tokens.bin"), "300", "1234", "256")
    header = struct.pack("<256i", 20240520, 1, 4000, *[0] * 253)
    (directory / "tokens.bin").write_bytes(header + struct.pack("<4000H", *tokens))
    c["shardmesh"]["data"]["format"] = "llmc"
    (directory / "job.json").write_text(json.dumps(c))
    expect(directory / "job.json", 42, str(directory / "tokens.bin"), "300", "1234", "256")
    nothing_left(directory)


def too_large(directory):
    """Refused before anything is allocated, with the numbers."""
    path = edit(directory, '"n_embd": 64', '"n_embd": 65536')
    began = time.monotonic()
    expect(path, 42, "GiB")
    check(time.monotonic() - began < 20, "took long to refuse")
    nothing_left(directory)


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
    before = (directory / "run/steps.jsonl").read_bytes()
    p = subprocess.run([BIN / "meshctl", "coordinator", "--config", path, "--listen", "127.0.0.1:0", "--rdzv-id", "another"],
                       capture_output=True, text=True, env=clean_environment(SHARDMESH_TOKEN="x" * 32), timeout=60)
    check(p.returncode != 0 and str(directory / "run") in p.stderr and "holds job" in p.stderr, f"{p.returncode}: {p.stderr}")
    check((directory / "run/steps.jsonl").read_bytes() == before, "the other job's steps.jsonl was changed")


def read_only_run_directory(directory):
    """Refused by name at the start, whoever asks: on a file system mounted read-only, or without the right to write."""
    path = config(directory, steps=1)
    place = directory / "place"
    place.mkdir()
    somebody = as_somebody(directory)
    if somebody is not None:
        place.chmod(0o555)
        for run_dir in (place, place / "run"):
            expect(path, 1, str(run_dir), "Permission denied", flags=["--run-dir", run_dir], **somebody)
        place.chmod(0o755)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", place], capture_output=True).returncode:
        print("read_only_run_directory: mount is not allowed here")
        return
    try:
        for run_dir in (place, place / "run"):
            said = expect(path, 1, str(run_dir), "Read-only file system", flags=["--run-dir", run_dir])
            check(said.count("Read-only") == 1, f"said more than once:\n{said}")
    finally:
        subprocess.run(["umount", place], check=True)


def held_lock(directory):
    """A run directory in which a coordinator is at work is refused, and that one is not disturbed."""
    first = start(config(directory, steps=100000))
    try:
        wait_for(lambda: lines(directory / "run") >= 1, "step 1")
        env = clean_environment(SHARDMESH_TOKEN="x" * 32)
        p = subprocess.run([BIN / "meshctl", "coordinator", "--config", directory / "job.json", "--listen", "127.0.0.1:0",
                            "--run-dir", directory / "run"], capture_output=True, text=True, env=env, timeout=60)
        check(p.returncode == 1, f"exit code {p.returncode}: {p.stderr}")
        check(str(directory / "run") in p.stderr and str(members(first, "coordinator")[0]) in p.stderr, p.stderr)
        before = lines(directory / "run")
        wait_for(lambda: lines(directory / "run") > before, "the first job to go on")
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


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
    where = ["--rdzv-endpoint", "127.0.0.1:1", "--rdzv-id", "x"]
    for program in ([BIN / "worker", *where], [BIN / "shardsvc", *where], [BIN / "meshctl", "coordinator", "--config", path],
                    [BIN / "meshctl", "status", *where], [BIN / "meshctl", "bench", "fabric", "--connect", "127.0.0.1:1"]):
        p = subprocess.run([*program, "--token-file", token], capture_output=True, text=True, env=clean_environment(),
                           timeout=30)
        check(p.returncode != 0 and str(token) in p.stderr and "chmod" in p.stderr, f"{p.returncode}: {p.stderr}")


def non_finite(directory):
    """A diverging job names step, micro-batch and unit."""
    c = json.loads(config(directory, optimizer__params__lr=1e30, steps=50).read_text())
    del c["scheduler"]
    path = directory / "job.json"
    path.write_text(json.dumps(c))
    said = expect(path, 1, "step", "not finite")
    check(re.search(r"step \d+: the (loss of micro-batch \d+|gradient) is not finite: unit \d+ .*", said), said)


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
    main([keys, batches, flags, missing_files, unreadable_files, short_data, jsonl_lines, tokenizers, hostile_weights,
          token_beyond_vocabulary, too_large, port_in_use, run_directories, read_only_run_directory, held_lock, stale_lock,
          token_files, non_finite, full_disk, no_descriptors])
