#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# ofi.sh [PAIRS] [SECONDS]: what libfabric over TCP gets of a link that iperf3 gets too: two network namespaces joined by
# a veth pair, bare and at 1 Gbit/s. iperf3, reads and pushes of 1 MiB, 16 in flight, take turns, PAIRS times (5) of
# SECONDS (3). Prints GB/s, medians, and their ratio to iperf3's. Exit status 77 with "skipped: REASON" where there can
# be no namespaces.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/ofi/net.sh
. tests/ofi/net.sh
pairs=${1:-5}
seconds=${2:-3}
bin=${SHARDMESH_BIN:-$PWD/build/release/bin}
work=$(mktemp -d)
command -v iperf3 >/dev/null || net_skip "no iperf3"
net_open
trap 'net_close; rm -rf "$work"' EXIT
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$work/token"
chmod 600 "$work/token"

iperf() {
	ip netns exec "$net_a" iperf3 -s -1 -B 10.77.0.1 >/dev/null 2>&1 &
	local server=$!
	sleep 0.5
	ip netns exec "$net_b" iperf3 -c 10.77.0.1 -t "$seconds" -J >"$work/iperf.json"
	wait $server || true
	python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["end"]["sum_received"]["bits_per_second"] / 8e9)' \
		"$work/iperf.json"
}

fabric() { # read|push
	local common=(bench fabric --token-file "$work/token" --fabric ofi)

	ip netns exec "$net_a" "$bin/meshctl" "${common[@]}" --listen 10.77.0.1:29400 >/dev/null 2>"$work/listen.log" &
	local server=$!
	sleep 0.5
	ip netns exec "$net_b" "$bin/meshctl" "${common[@]}" --connect 10.77.0.1:29400 --operation "$1" --sizes 1M \
		--depths 16 --seconds "$seconds" --json >"$work/fabric.json"
	wait $server || true
	python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["results"][0]["gb_per_s"])' "$work/fabric.json"
}

measure() { # name
	local i
	rm -f "$work"/{iperf,read,push}
	for ((i = 0; i < pairs; i++)); do
		iperf >>"$work/iperf"
		fabric read >>"$work/read"
		fabric push >>"$work/push"
	done
	python3 - "$1" "$work" <<'END'
import statistics, sys
name, work = sys.argv[1:]
median = {k: statistics.median(map(float, open(f"{work}/{k}"))) for k in ("iperf", "read", "push")}
print(f"{name}: iperf3 {median['iperf']:.3f} GB/s, "
      + ", ".join(f"{k} {median[k]:.3f} ({median[k] / median['iperf']:.2f})" for k in ("read", "push")))
END
}

measure bare
net_rate 1gbit
measure 1gbit
