#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# run.sh: a job whose members are in two network namespaces, a shard service and a worker in each, over libfabric: on
# the bare link, on a slow one, with lost packets, with a link that is down for two seconds, and with connections that
# are reset; and two workers in each, of which each namespace reads the other's parameters once. Each time the bits are
# those of the same job over shared memory, and nothing waits longer than the network made it. Exit status 77 with
# "skipped: REASON" where there can be no namespaces.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/ofi/net.sh
. tests/ofi/net.sh
export SHARDMESH_BIN=${SHARDMESH_BIN:-$PWD/build/release/bin}
net_open
job() { # name
	python3 tests/ofi/job.py "$1" "$net_a" "$net_b"
}

job bare
python3 tests/ofi/share.py "$net_a" "$net_b"
net_rate 100mbit
job slow
net_rate none
net_loss 0.01
job loss
net_loss 0
job link_down
job resets
