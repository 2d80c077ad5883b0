#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# run.sh [--all] [DIR]: the fabric over a real kernel's verbs. In soft-RoCE guests (guest.sh) the same small job runs
# over local, verbs and ofi on one host, then on two, then on two where a worker is killed or the network is bad
# (jobs.sh): all with the same bits. Beside it a member attacks, and connections come and go, and leave nothing behind.
# Then the throughput against perftest's. What the guests leave is in DIR (build/roce/run). The last line is
#   roce: same bits, fetch R of ib_read_bw, push R of ib_write_bw
# with R the lower of those at 64 KiB and 1 MiB; tests/bench/roce.sh measures longer. --all: also a GID that moves,
# every way to connect without trouble, and 10,000 connections and 1,000 errors (half an hour more). Exit status 77 with
# "skipped: REASON" where there can be no guest.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/roce/guest.sh
. tests/roce/guest.sh
stages=(alone pair killed delay loss link-down)
names=(alone-local alone-verbs alone-ofi pair-auto killed delay loss link-down)
more=0
if [[ ${1-} == --all ]]; then
	more=1
	stages+=(gid)
	names+=(gid)
	shift
fi
out=${1:-build/roce/run}

guest_prepare
export SHARDMESH_BIN=${SHARDMESH_BIN:-$PWD/build/release/bin}
guest_run -n 2 -t 900 -o "$out/jobs" tests/roce/jobs.sh "${stages[@]}"
python3 tests/roce/compare.py "$out/jobs/jobs" "${names[@]}"
if ((more)); then
	guest_run -n 2 -t 600 -o "$out/more" tests/roce/jobs.sh verbs cm control
	cp -r "$out/jobs/jobs/alone-local" "$out/more/jobs/"
	python3 tests/roce/compare.py "$out/more/jobs" alone-local pair-verbs pair-cm pair-control
	# One host is enough, and has the cores to itself.
	guest_run -t 5400 -o "$out/cycles" tests/roce/jobs.sh cycles
fi
guest_run -t 300 -o "$out/measure" tests/roce/measure.sh 1
ratios=$(python3 tests/roce/ratios.py "$out/measure/measured")
echo "$ratios"
echo "roce: same bits, $(tail -n 1 <<<"$ratios")"
