#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# jobs.sh [STAGES...]: in two guests, the same small job over and over; each leaves /guest/jobs/NAME with its
# steps.jsonl for run.sh to compare. Stages, all by default, in this order:
#   alone       in guest 1, over local, verbs and ofi: 2 shard services and 2 workers
#   pair        a shard service and a worker in each guest, verbs between all and verbs between the guests alone (auto)
#   link-down   likewise, and the data network is gone for 2 seconds in the middle
#   delay, loss likewise, every packet 1 ms late in both guests, or one in a hundred lost
# Members find the coordinator over the control network, whose cable stays in.
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
	cp -r "$2/steps.jsonl" "$2/log" "/guest/jobs/$1/"
}

# One guest's members of a job, each with a log; guest 1 also has the coordinator. Fails when one of them does.
members() { # fabric, run directory
	local link=(--rdzv-endpoint "$(control_address 1):$port" --rdzv-id pair) pids=() pid rc=0
	mkdir -p "$2/log"
	if ((GUEST == 1)); then
		"$SHARDMESH_BIN/meshctl" coordinator --config tests/roce/job.json --fabric "$1" --run-dir "$2" \
			--rdzv-id pair --listen "$(control_address 1):$port" >"$2/log/coordinator.out" 2>&1 &
		pids+=($!)
	fi
	"$SHARDMESH_BIN/shardsvc" "${link[@]}" >"$2/log/shardsvc.out" 2>&1 &
	pids+=($!)
	"$SHARDMESH_BIN/worker" "${link[@]}" >"$2/log/worker.out" 2>&1 &
	pids+=($!)
	for pid in "${pids[@]}"; do
		wait "$pid" || rc=$?
	done
	return $rc
}

in_the_middle() { # run directory
	(($(steps "$1") >= 3))
}

# In guest 1 beside the job: the link goes when three steps are done, and some must be missing when it is back.
take_link() { # run directory
	wait_for 200 in_the_middle "$1" || fail "the job never came to its third step"
	link_down 2
	(($(steps "$1") < 10)) || fail "the job was over before the link was back"
	echo "the link was down for 2 s behind step 3"
}

pair() { # name, fabric, "link-down" or netem's words
	local run=/tmp/$1.run sent received trouble='' rc=0
	export SHARDMESH_TOKEN_FILE=/guest/token
	if ((GUEST == 1)) && ! [[ -f /guest/token ]]; then
		(umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >/guest/token)
	fi
	barrier "$1.begin"
	sent=$(network_bytes data tx) received=$(network_bytes data rx)
	if [[ ${3-} != link-down ]]; then
		bad_network "${@:3}"
	elif ((GUEST == 1)); then
		take_link "$run" &
		trouble=$!
	fi
	members "$2" "$run" || rc=$?
	((rc)) || [[ -z $trouble ]] || wait "$trouble" || rc=$?
	bad_network
	if ((GUEST == 1 && rc == 0)); then
		leave "$1" "$run"
	fi
	((rc == 0)) || fail "$1 failed: $(tail -n 30 "$run"/log/*.out)"
	sent=$(($(network_bytes data tx) - sent)) received=$(($(network_bytes data rx) - received))
	echo "$1: $sent bytes sent to the other host, $received received"
	mkdir -p "/guest/jobs/$1"
	echo "$sent $received" >"/guest/jobs/$1/bytes.$GUEST"
	barrier "$1.end" 300
}

stages=("$@")
if ((${#stages[@]} == 0)); then
	stages=(alone pair link-down delay loss)
fi
for stage in "${stages[@]}"; do
	case $stage in
	alone)
		if ((GUEST == 1)); then
			for fabric in local verbs ofi; do
				alone "$fabric"
			done
		fi
		barrier alone 600
		;;
	pair)
		pair pair-verbs verbs
		pair pair-auto auto
		;;
	link-down) pair link-down verbs link-down ;;
	delay) pair delay verbs delay 1ms ;;
	loss) pair loss verbs loss 1% ;;
	*) fail "no stage $stage" ;;
	esac
done
