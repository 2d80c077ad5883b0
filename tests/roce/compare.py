# SPDX-License-Identifier: Apache-2.0
"""compare.py DIR NAME...: the jobs that jobs.sh left in DIR/NAME/ gave the same bits, and between hosts went the bytes
that are due; where two workers share a host, it reads the other's parameters once."""
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "integration"))
from harness import Failed, bits, check, same_bits, steps  # noqa: E402

STEPS = 10
VERSIONS = STEPS + 1  # the last is evaluated
# Of job.json's model: embeddings, two blocks, the final norm.
PARAMETERS = (256 + 64) * 128 + 2 * (12 * 128 * 128 + 13 * 128) + 2 * 128


def bytes_between(directory):
    """Of each host: every worker reads the other host's half forward and backward, and pushes that half's gradient."""
    for guest in (1, 2):
        sent, received = (int(n) / STEPS / (4 * PARAMETERS) for n in (directory / f"bytes.{guest}").read_text().split())
        text = f"{directory.name}: guest {guest} sent {sent:.2f} and received {received:.2f} copies of the model a step"
        # Three halves each way are due, less what a worker keeps; evaluations, padding to pages and headers add.
        check(2 <= sent + received <= 4.5, text)
        print(text, flush=True)


def messages(log):
    return "\n".join(json.loads(line)["msg"] for line in log.read_text().splitlines() if line.startswith("{"))


def once_a_host(directory):
    """Guest 2, where nobody dies, has two workers. Together they read guest 1's parameters once a version, over verbs,
    and copy from each other; twice only what one seized because the other took long."""
    there = 4 * int(re.search(r"ready: (\d+) elements", messages(directory / "log.1/shardsvc.out"))[1])
    said = [messages(directory / f"log.2/worker-{i}.out") for i in (1, 2)]
    counts = [re.search(r"sharing: (\d+) .* network, (\d+) from .*\((\d+) bytes\)", s) for s in said]
    check(all(counts), f"a worker does not say what it read: {said}")
    read, copied, seized = (sum(int(c[i]) for c in counts) for i in (1, 2, 3))
    text = (f"{directory.name}: {there} bytes of parameters in guest 1, read {VERSIONS} times; guest 2's workers read "
            f"{read} of them ({seized} seized) and {copied} from each other")
    print(text, flush=True)
    # The first version may be there before the two know each other.
    check(VERSIONS * there <= read - seized <= (VERSIONS + 1) * there, text)
    check(read <= int((directory / "bytes.2").read_text().split()[1]), f"{text}; fewer bytes came over the network")
    check(read < 1.5 * VERSIONS * there and copied > 0, text)


def main():
    jobs = [pathlib.Path(sys.argv[1]) / name for name in sys.argv[2:]]
    want = bits(jobs[0], STEPS)
    check(all(r[6] != "None" for r in want), "no state hash to compare")
    for job in jobs[1:]:
        same_bits(job.name, bits(job, STEPS), want)
        # Lost packets are sent again, and a step after a broken connection may be.
        if job.name.startswith("pair"):
            bytes_between(job)
        if job.name == "killed":
            once_a_host(job)
            check([s["workers"] for s in steps(job)][::STEPS - 1] == [4, 3], f"{job}: not 4 workers, then 3")
    print("same bits:", " ".join(j.name for j in jobs))


try:
    main()
except Failed as problem:
    sys.exit(f"FAIL: {problem}")
