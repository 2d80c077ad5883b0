# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# Two network namespaces of this process' own, joined by a veth pair: sourced by run.sh and tests/bench/ofi.sh.
#   net_open              namespaces $net_a (10.77.0.1) and $net_b (10.77.0.2); or says "skipped: REASON" and exits 77
#   net_rate RATE         both directions, tc's units ("400mbit"); none: as fast as it goes
#   net_loss PROBABILITY  of packets that arrive, either side; 0: none
# All is gone when the script ends.

net_a=shardmesh-$$-a
net_b=shardmesh-$$-b

net_skip() {
	echo "skipped: $1"
	exit 77
}

net_close() {
	ip netns del "$net_a" 2>/dev/null || true
	ip netns del "$net_b" 2>/dev/null || true
}

net_open() {
	local tool
	(($(id -u) == 0)) || net_skip "only root makes network namespaces"
	for tool in ip tc iptables; do
		command -v "$tool" >/dev/null || net_skip "no $tool (packages iproute2, iptables)"
	done
	trap net_close EXIT
	if ! ip netns add "$net_a" 2>/dev/null || ! ip netns add "$net_b" 2>/dev/null; then
		net_skip "no network namespaces here"
	fi
	ip -n "$net_a" link add link0 type veth peer name link0 netns "$net_b" 2>/dev/null ||
		net_skip "the kernel has no veth"
	ip -n "$net_a" addr add 10.77.0.1/24 dev link0
	ip -n "$net_b" addr add 10.77.0.2/24 dev link0
	for tool in "$net_a" "$net_b"; do
		ip -n "$tool" link set lo up
		ip -n "$tool" link set link0 up
	done
}

net_rate() {
	local net
	for net in "$net_a" "$net_b"; do
		tc -n "$net" qdisc del dev link0 root 2>/dev/null || true
		[[ $1 == none ]] || tc -n "$net" qdisc add dev link0 root tbf rate "$1" burst 256k latency 50ms 2>/dev/null ||
			net_skip "the kernel has no sch_tbf"
	done
}

net_loss() {
	local net
	for net in "$net_a" "$net_b"; do
		ip netns exec "$net" iptables -F INPUT 2>/dev/null || net_skip "no iptables in a namespace"
		[[ $1 == 0 ]] || ip netns exec "$net" iptables -A INPUT -i link0 -m statistic --mode random \
			--probability "$1" -j DROP 2>/dev/null || net_skip "iptables has no match statistic"
	done
}
