#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# jobs.sh [STAGES...]: in two guests, the same small job over and over; each leaves /guest/jobs/NAME with its
# steps.jsonl for run.sh to compare. Stages, in the order in which they are named; by default those with a star:
#   alone *     in guest 1, over local, verbs and ofi: 2 shard services and 2 workers. In guest 2 meanwhile
#               roce_attack, roce_cycles
#   pair *      a shard service and a worker in each guest: local on a host, verbs between the two (auto)
#   killed *    likewise with two workers in each guest, one of which, in guest 1, is killed in the middle
#   verbs       likewise, and verbs between all
#   cm, control likewise, connected by librdmacm, or over the control connections
#   delay *     likewise, by librdmacm, every packet 1 ms late in both guests
#   loss *      likewise, and one packet in a hundred is lost
#   link-down * likewise, and the data network of guest 1 is gone for 2 seconds in the middle. librdmacm is not relied
#               upon from here: soft-RoCE does not answer it any more after that
#   gid *       likewise, over the control connections, and its address goes and comes back at another GID index
#   cycles      in guest 1 what guest 2 does in alone, with 10,000 connections and 1,000 errors, half by librdmacm
# Members find the coordinator over the control network, whose cable stays in. After each job the device and the kernel
# have what they had before.
set -euo pipefail
# shellcheck source=tests/roce/inside.sh
. tests/roce/inside.sh

port=29400

alone() { # fabric
	local before said=/tmp/alone-$1
	before=$(rdma_counter sent_pkts)
	"$SHARDMESH_BIN/meshctl" run --config tests/roce/job.json --fabric "$1" --run-dir "$said.run" >"$said.out" 2>&1 ||
		fail "the job over $1 failed: $(tail -n 30 "$said.out")"
	leave "alone-$1" "$said.run"
	echo "over $1: $(steps "$said.run") steps, $(($(rdma_counter sent_pkts) - before)) packets of rxe0"
	if [[ $1 == verbs ]] && (($(rdma_counter sent_pkts) - before < 1000)); then
		fail "that was not over verbs: $(cat "$said.out")"
	fi
}

steps() { # run directory
	if [[ -f $1/steps.jsonl ]]; then
		wc -l <"$1/steps.jsonl"
	else
		echo 0
	fi
}

# The logs too, for a look.
leave() { # name, run directory
	mkdir -p "/guest/jobs/$1"
	cp -r "$2/log" "/guest/jobs/$1/log.$GUEST"
	if ((GUEST == 1)); then
		cp "$2/steps.jsonl" "/guest/jobs/$1/"
	fi
}

# What somebody can do from outside, and what is left behind; `before` and after, the kernel counts the same.
outside() { # connections, errors
	local before how
	before=$(rdma_objects)
	for how in cm control; do
		"$SHARDMESH_BIN/roce_attack" "$how" >"/guest/attack-$how.out" ||
			fail "attack by $how: $(tail -n 30 "/guest/attack-$how.out")"
		tail -n 1 "/guest/attack-$how.out"
		"$SHARDMESH_BIN/roce_cycles" "$how" "$1" "$2" || fail "cycles by $how"
	done
	[[ $(rdma_objects) == "$before" ]] || fail "left behind: $(rdma_objects), before: $before"
}

# One guest's members of a job, each with a log; guest 1 also has the coordinator. Fails when one of them does that was
# not killed.
members() { # fabric, run directory
	local link=(--rdzv-endpoint "$(control_address 1):$port" --rdzv-id pair --rdma-connect "$connect")
	local pids=() pid i one rc=0
	mkdir -p "$2/log"
	if ((GUEST == 1)); then
		"$SHARDMESH_BIN/meshctl" coordinator --config tests/roce/job.json --fabric "$1" --run-dir "$2" \
			--workers $((GUESTS * workers)) --rdzv-id pair --listen "$(control_address 1):$port" \
			>"$2/log/coordinator.out" 2>&1 &
		pids+=($!)
	fi
	"$SHARDMESH_BIN/shardsvc" "${link[@]}" >"$2/log/shardsvc.out" 2>&1 &
	pids+=($!)
	for ((i = 1; i <= workers; i++)); do
		"$SHARDMESH_BIN/worker" "${link[@]}" >"$2/log/worker-$i.out" 2>&1 &
		pids+=($!)
	done
	echo $! >"$2/last-worker"
	for pid in "${pids[@]}"; do
		one=0
		wait "$pid" || one=$?
		((one == 0)) || { ((one == 137)) && [[ $pid == "$(cat "$2/killed")" ]]; } || rc=$one
	done
	return $rc
}

in_the_middle() { # run directory
	(($(steps "$1") >= 3))
}

# In guest 1 beside the job: it happens when three steps are done, and some must be missing when it is over.
trouble() { # what, run directory
	wait_for 200 in_the_middle "$2" || fail "the job never came to its third step"
	case $1 in
	link-down) link_down 2 ;;
	gid) move_gid ;;
	killed) cp "$2/last-worker" "$2/killed" && kill -9 "$(cat "$2/killed")" ;;
	esac
	(($(steps "$2") < 10)) || fail "the job was over before $1 was"
	echo "$1 behind step 3, over before step $(($(steps "$2") + 1))"
}

# What a job may not leave behind: of the device, shared memory, processes.
left_behind() {
	echo "$(rdma_objects) shared memory: $(ls /dev/shm) processes: $(ps -C meshctl,shardsvc,worker -o pid=,comm=)"
}

as_before() { # what left_behind said
	[[ $(left_behind) == "$1" ]]
}

# Whoever had to do with the worker that was killed in guest 1 says who is gone: the coordinator, both shard services,
# the worker beside it.
named() { # run directory
	local who
	if ((GUEST == 1)); then
		who=$(sed -n "s/.*\(worker [0-9]*\) (pid $(cat "$1/killed") on guest1) is gone.*/\1/p" \
			"$1/log/coordinator.out")
		[[ -n $who ]] || fail "the coordinator does not say who is gone: $(cat "$1/log/coordinator.out")"
		grep -q "$who shares nothing with us" "$1/log/worker-1.out" || fail "nobody beside $who misses it"
		echo "$who" >/guest/killed
	fi
	barrier killed.named
	who=$(cat /guest/killed)
	grep -q "$who ([^)]*): " "$1/log/shardsvc.out" || fail "a shard service does not say that $who is gone"
	((GUEST > 1)) || echo "$who was killed; coordinator, shard services and the worker beside it say so"
}

pair() { # name, fabric, "link-down", "gid", "killed" or netem's words
	local run=/tmp/$1.run sent received beside='' rc=0 before
	before=$(left_behind)
	export SHARDMESH_TOKEN_FILE=/guest/token
	if ((GUEST == 1)) && ! [[ -f /guest/token ]]; then
		(umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >/guest/token)
	fi
	barrier "$1.begin"
	sent=$(network_bytes data tx) received=$(network_bytes data rx)
	case ${3-} in
	link-down | gid | killed)
		if ((GUEST == 1)); then
			trouble "$3" "$run" &
			beside=$!
		fi
		;;
	*) bad_network "${@:3}" ;;
	esac
	members "$2" "$run" || rc=$?
	((rc)) || [[ -z $beside ]] || wait "$beside" || rc=$?
	bad_network
	((rc == 0)) || fail "$1 failed: $(tail -n 30 "$run"/log/*.out)"
	leave "$1" "$run"
	if [[ ${3-} == gid ]] && ((GUEST == 1)); then
		grep -q 'its GID moved' "$run"/log/*.out || fail "$1: the GID stayed where it was"
	fi
	[[ ${3-} != killed ]] || named "$run"
	# The device takes back what a process had behind its end.
	wait_for 10 as_before "$before" || fail "$1 left behind: $(left_behind), before: $before"
	sent=$(($(network_bytes data tx) - sent)) received=$(($(network_bytes data rx) - received))
	echo "$1: $sent bytes sent to the other host, $received received"
	echo "$sent $received" >"/guest/jobs/$1/bytes.$GUEST"
	barrier "$1.end" 300
}

stages=("$@")
if ((${#stages[@]} == 0)); then
	stages=(alone pair killed delay loss link-down gid)
fi
for stage in "${stages[@]}"; do
	connect=auto workers=1
	case $stage in
	alone)
		if ((GUEST == 1)); then
			for fabric in local verbs ofi; do
				alone "$fabric"
			done
		else
			outside 100 120
		fi
		barrier alone 600
		;;
	pair) pair pair-auto auto ;;
	killed) workers=2 pair killed auto killed ;;
	verbs) pair pair-verbs verbs ;;
	cm | control) connect=$stage pair "pair-$stage" verbs ;;
	delay) connect=cm pair delay verbs delay 1ms ;;
	loss) pair loss verbs loss 1% ;;
	link-down) pair link-down verbs link-down ;;
	gid) connect=control pair gid verbs gid ;;
	cycles)
		if ((GUEST == 1)); then
			outside 5000 500
		fi
		barrier cycles 5400
		;;
	*) fail "no stage $stage" ;;
	esac
done
