#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# boot.sh: second stage of the guest: two networks, soft-RoCE on the first, then the script. Run from the share, where
# it finds "start" (the environment and what to run) and leaves out.N (what was said) and rc.N (how it ended).
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
GUEST=$(sed -n 's/.*\bguest=\([0-9]*\).*/\1/p' /proc/cmdline)
export GUEST

network() { # device, name, first three bytes of the address, MTU
	ip link set "$1" down && ip link set "$1" name "$2" && ip link set "$2" mtu "$4" up &&
		ip addr add "$3.$GUEST/24" dev "$2"
}

prepare() {
	hostname "guest$GUEST"
	mount -o remount,size=50% /dev/shm
	ip link set lo up &&
		# More than 4096 and the headers, so that the path MTU is 4096.
		network eth0 data 10.77.0 4500 &&
		network eth1 control 10.78.0 1500 &&
		rdma link add rxe0 type rxe netdev data
}

if prepare >"/guest/out.$GUEST" 2>&1; then
	bash /guest/start >>"/guest/out.$GUEST" 2>&1 </dev/null
	rc=$?
else
	echo "guest: the networks did not come up" >>"/guest/out.$GUEST"
	rc=125
fi
# Under another name first: whoever sees the file sees the number.
echo "$rc" >"/guest/.rc.$GUEST" && mv "/guest/.rc.$GUEST" "/guest/rc.$GUEST"
busybox poweroff -f
