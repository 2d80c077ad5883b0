#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# measure.sh RUNS [pages]: in a guest, `meshctl bench fabric --fabric verbs` and perftest's programs in turn, RUNS times
# each, at the same size and depth, both sides in this guest. Leaves the throughputs in /guest/measured, MB/s (10^6), a
# line "WHAT BYTES OURS THEIRS" for each pair of runs; with "pages" also a GPT-2 block (7.09 million fp32 parameters) in
# pages from 4 owners ("OURS") and in one piece from one owner ("THEIRS").
set -euo pipefail
# shellcheck source=tests/roce/inside.sh
. tests/roce/inside.sh

runs=$1
cells=("65536 16 1500" "1048576 8 100") # size, depth, perftest's iterations: a second or more

# A number of the JSON object on stdin, by its path.
number() {
	python3 -c 'import json, sys, functools
print(functools.reduce(lambda x, k: x[int(k)] if k.isdigit() else x[k], sys.argv[1].split("."), json.load(sys.stdin)))' "$1"
}

ours() { # read or push, size, depth
	# One buffer over and over, as perftest does with messages of more than half a page.
	"$SHARDMESH_BIN/meshctl" bench fabric --fabric verbs --operation "$1" --sizes "$2" --depths "$3" \
		--memory "$2" --seconds 2 --json | number results.0.gb_per_s | awk '{ print $1 * 1000 }'
}

theirs() { # read or push, size, depth, iterations
	local program=ib_read_bw
	if [[ $1 == push ]]; then
		program=ib_write_bw
	fi
	perftest "$program" -s "$2" -t "$3" -n "$4"
}

pages() {
	"$SHARDMESH_BIN/meshctl" bench fabric --fabric verbs --owners 4 --seconds 4 --json >/tmp/pages.json
	echo "pages 65536 $(number pages.gb_per_s </tmp/pages.json) $(number pages.contiguous_gb_per_s </tmp/pages.json)"
}

: >/guest/measured
for ((run = 1; run <= runs; run++)); do
	for what in read push; do
		for cell in "${cells[@]}"; do
			read -r size depth iterations <<<"$cell"
			mine=$(ours "$what" "$size" "$depth")
			yours=$(theirs "$what" "$size" "$depth" "$iterations")
			echo "$what $size $mine $yours" | tee -a /guest/measured
		done
	done
	if [[ ${2-} == pages ]]; then
		pages | tee -a /guest/measured
	fi
done
