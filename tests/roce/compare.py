# SPDX-License-Identifier: Apache-2.0
"""compare.py DIR NAME...: the jobs that jobs.sh left in DIR/NAME/ gave the same bits, and between hosts went the bytes
that are due."""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "integration"))
from harness import Failed, bits, check, same_bits  # noqa: E402

STEPS = 10
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


def main():
    jobs = [pathlib.Path(sys.argv[1]) / name for name in sys.argv[2:]]
    want = bits(jobs[0], STEPS)
    check(all(r[6] != "None" for r in want), "no state hash to compare")
    for job in jobs[1:]:
        same_bits(job.name, bits(job, STEPS), want)
        # Lost packets are sent again, and a step after a broken connection may be.
        if job.name.startswith("pair"):
            bytes_between(job)
    print("same bits:", " ".join(j.name for j in jobs))


try:
    main()
except Failed as problem:
    sys.exit(f"FAIL: {problem}")
