# SPDX-License-Identifier: Apache-2.0
"""ratios.py FILE: from measure.sh's lines, medians and their ratio for each operation and size; the last line is the
lowest of each operation, "fetch R of ib_read_bw, push R of ib_write_bw"."""
import statistics
import sys


def main():
    lines = {}
    with open(sys.argv[1]) as f:
        for line in f:
            what, size, ours, theirs = line.split()
            lines.setdefault((what, int(size)), []).append((float(ours), float(theirs)))
    ratio = {}
    for (what, size), pairs in lines.items():
        ours, theirs = (statistics.median(p[side] for p in pairs) for side in (0, 1))
        ratio[what, size] = ours / theirs
        unit = "GB/s" if what == "pages" else "MB/s"
        print(f"{what:5} {size:8}: {ours:8.3f} {unit}, against {theirs:8.3f}: {ours / theirs:.3f}, median of {len(pairs)}")
    lowest = {what: min(r for (w, _), r in ratio.items() if w == what) for what in ("read", "push")}
    print(f"fetch {lowest['read']:.2f} of ib_read_bw, push {lowest['push']:.2f} of ib_write_bw")


main()
