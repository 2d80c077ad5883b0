# SPDX-License-Identifier: Apache-2.0
"""meshctl bench fabric: what it says of every fabric that is here, alone and between two that know a token."""
import json
import os
import subprocess

from harness import BIN, check, clean_environment, main, wait_for


def bench(*flags, **env):
    done = subprocess.run([BIN / "meshctl", "bench", "fabric", *flags], capture_output=True, text=True, timeout=60,
                          env=clean_environment(**env))
    return done.returncode, done.stdout, done.stderr


def providers():
    """As the program names them, but those that this host cannot use."""
    names = bench("--fabric", "none")[2].split("there are auto, ")[1].split("\n")[0].split(", ")
    return [n for n in names if bench("--fabric", n, "--sizes", "4K", "--depths", "1", "--seconds", "0.01")[0] == 0]


def cells(directory):
    here = providers()
    check("local" in here and "local-copy" in here, here)
    for name in here:
        code, out, err = bench("--fabric", name, "--sizes", "4K,1M", "--depths", "1,16", "--seconds", "0.3", "--json")
        check(code == 0, err)
        said = json.loads(out)
        check(said["fabric"] == name and said["description"], out)
        check([(r["operation"], r["bytes"], r["depth"]) for r in said["results"]]
              == [(o, b, d) for o in ("read", "push") for b in (4096, 1 << 20) for d in (1, 16)], out)
        for r in said["results"]:
            us = r["latency_us"]
            check(r["gb_per_s"] > 0 and abs(r["gb_per_s"] * 1e9 / r["bytes"] / r["messages_per_s"] - 1) < 0.01, r)
            check(0 < us["p50"] <= us["p99"] <= us["p999"] <= us["max"] * 1.04, r)


def pages(directory):
    code, out, err = bench("--fabric", "local-copy", "--owners", "4", "--seconds", "0.1", "--json")
    check(code == 0, err)
    said = json.loads(out)["pages"]
    check(said["owners"] == 4 and said["runs"] <= 64 and said["ratio"] > 0, out)
    check(said["page_bytes"] == 65536 and said["unit_bytes"] == 7087872 * 4, out)


def two_sides(directory):
    token = os.urandom(32).hex()
    listening = subprocess.Popen([BIN / "meshctl", "bench", "fabric", "--listen", "127.0.0.1:0"],
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                 env=clean_environment(SHARDMESH_TOKEN=token))
    try:
        endpoint = listening.stdout.readline().split()[-1]
        flags = ["--connect", endpoint, "--fabric", "local-copy", "--sizes", "64K", "--depths", "4", "--seconds", "0.05"]
        code, out, err = bench(*flags, SHARDMESH_TOKEN="x" * 32)
        check(code == 1 and "token" in err, f"{code} {err}")
        check(listening.poll() is None, "a stranger ended it")
        code, out, err = bench(*flags, "--json", SHARDMESH_TOKEN=token)
        check(code == 0 and len(json.loads(out)["results"]) == 2, f"{code} {out} {err}")
        wait_for(lambda: listening.poll() is not None, "the passive side to end", 10)
        check(listening.returncode == 0, f"exited with {listening.returncode}")
    finally:
        listening.kill()


def bad_flags(directory):
    p = subprocess.run([BIN / "meshctl", "bench", "--help"], capture_output=True, text=True, env=clean_environment())
    check(p.returncode == 0 and "usage: meshctl bench fabric" in p.stdout, p.stdout + p.stderr)
    for flags in (["--sizes", "4Q"], ["--depths", "0"], ["--seconds", "0"], ["--operation", "write"], ["--rdma-mtu", "9000"],
                  ["--rdma-connect", "now"], ["--listen", "a:1", "--connect", "b:1"], ["--owners", "1000"]):
        code, out, err = bench(*flags)
        check(code == 2 and flags[0].strip("-").split("-")[-1] in err, f"{flags}: {code} {err}")


main([cells, pages, two_sides, bad_flags])
