# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# inside.sh: what scripts in the guest share; see guest.sh for where they run. Sourced.

fail() {
	echo "$*"
	exit 1
}

# Waits until `"${@:2}"` succeeds, for at most $1 seconds.
wait_for() {
	local deadline=$((SECONDS + $1))
	until "${@:2}"; do
		((SECONDS < deadline)) || return 1
		sleep 0.2
	done
}

# Address of guest $1 (this one) on the data network, where rxe0 is, and on the control network.
data_address() {
	echo "10.77.0.${1:-$GUEST}"
}

control_address() {
	echo "10.78.0.${1:-$GUEST}"
}

all_at_barrier() {
	local i
	for ((i = 1; i <= GUESTS; i++)); do
		# A guest that has ended badly will not come; nobody should wait for it.
		if [[ -f /guest/rc.$i && $(cat "/guest/rc.$i") != 0 ]]; then
			fail "guest $i failed; not waiting for it at $1"
		fi
		[[ -f /guest/barrier.$1.$i ]] || return 1
	done
}

# Returns when every guest has come to the barrier of this name; each name once.
barrier() { # name, seconds
	: >"/guest/barrier.$1.$GUEST"
	wait_for "${2:-120}" all_at_barrier "$1" || fail "not everybody came to $1"
}

# Of rxe0: "pd 1 cq 1 qp 1 cm_id 0 mr 0 ctx 0 srq 0". The kernel has one pd, cq and qp of its own.
rdma_objects() {
	rdma resource show rxe0 | sed 's/^.*: rxe0: //; s/ *$//'
}

rdma_count() { # qp, mr, ...
	rdma_objects | awk -v what="$1" '{ for (i = 1; i < NF; i += 2) if ($i == what) print $(i + 1) }'
}

# Of process $1: "fds 12 threads 3 mappings 40".
process_objects() {
	local fds=("/proc/$1/fd"/*) threads=("/proc/$1/task"/*)
	echo "fds ${#fds[@]} threads ${#threads[@]} mappings $(wc -l <"/proc/$1/maps")"
}

# Bytes on a network ("data", "control") in a direction ("rx", "tx"), headers and all.
network_bytes() {
	cat "/sys/class/net/$1/statistics/$2_bytes"
}

# A counter of rxe0: sent_pkts, rcvd_pkts, duplicate_request, out_of_seq_request, retry_exceeded_err, ...
rdma_counter() {
	cat "/sys/class/infiniband/rxe0/ports/1/hw_counters/$1"
}

# What this guest sends on the data network is delayed or lost: "delay 1ms", "loss 1%"; nothing: as it was.
bad_network() {
	if (($#)); then
		tc qdisc replace dev data root netem limit 100000 "$@"
	elif tc qdisc show dev data | grep -q netem; then
		tc qdisc del dev data root
	fi
}

# The data network's cable is out for $1 seconds. The address stays; the control network does not notice.
link_down() {
	ip link set data down
	sleep "$1"
	ip link set data up
}

# The data network's address goes, and when it comes back another has taken its place among the GIDs, for good.
move_gid() {
	ip addr del "$(data_address)/24" dev data
	ip addr add "10.99.0.$GUEST/24" dev data
	sleep 1
	ip addr add "$(data_address)/24" dev data
}

# perftest's programs ("ib_read_bw -s 65536 -n 100"). The serving side, for one client.
perftest_serve() { # program, arguments
	"$@" -d rxe0 >/dev/null 2>&1
}

# The asking side, of the server in guest $1: prints the average bandwidth in MB/s (10^6; perftest's MB are 2^20).
perftest_ask() { # guest, program, arguments
	local output
	if ! output=$("${@:2}" -d rxe0 "$(data_address "$1")" 2>&1); then
		echo "$output" >&2
		return 1
	fi
	awk '$1 ~ /^[0-9]+$/ && NF >= 5 { print $4 * 1.048576 }' <<<"$output"
}

listening() { # port
	[[ -n $(ss -Hltn "sport = :$1") ]]
}

# Both sides in this guest.
perftest() { # program, arguments
	local server rc=0
	perftest_serve "$@" &
	server=$!
	wait_for 20 listening 18515 || return 1
	perftest_ask "$GUEST" "$@" || rc=$?
	wait "$server" || rc=$?
	return $rc
}
