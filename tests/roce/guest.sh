#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# guest.sh: real verbs on a machine without a NIC. Boots Debian's kernel, which has soft-RoCE, under qemu and runs a
# script in it: 15 to 30 seconds from nothing to power-off.
#
#   tests/roce/guest.sh [-n GUESTS] [-t SECONDS] [-o DIR] SCRIPT [ARGUMENTS...]
#
# or, in a program of bash: `. tests/roce/guest.sh`, `guest_prepare` (once), then `guest_run` with the same arguments.
#
#   -n  guests (1); each runs the script, with another GUEST
#   -t  seconds they have altogether (300)
#   -o  what is shared with them: /guest inside; made empty first (build/roce/out/NAME.PID, removed when all is well)
# Exit status: the script's (of the first guest whose script failed); 77 where a guest cannot be had, with the line
# "skipped: REASON"; 124 when the time was over; 125 when a guest ended without a word (its kernel's is in DIR/serial.N).
# What the scripts say is printed as they say it, with "guest N: " before it if there are several, and is in DIR/out.N.
#
# Inside, the script runs as root under bash, in the repository's root directory. It sees the host's files at the same
# paths, may write anywhere (nothing stays, except under /guest), and has in the environment:
#   GUEST, GUESTS   its number, from 1, and how many there are
#   SHARDMESH_BIN   the programs (the host's SHARDMESH_BIN, else build/release/bin)
# `. tests/roce/inside.sh` gives it functions: addresses, counters, barriers between guests, a bad network.
# Networks: "data" (10.77.0.GUEST, MTU 4500, with the soft-RoCE device rxe0) and "control" (10.78.0.GUEST). All guests
# are on both. The processor is emulated: its math profile is not the host's, and only ratios of times mean anything.
#
# Environment: GUEST_CPUS (2) and GUEST_MEMORY in MiB (2048), of each guest; GUEST_PROCESSOR, qemu's -cpu. The default
# is "max,fma=off": a fused multiply-add takes the emulator 170 ns, a product and a sum together 3, so that training
# without it is ten times as fast.
#
# The image is under build/roce: kernel and modules unpacked from Debian's package (nothing of it is installed), an
# initramfs with busybox and the modules. It is made again when what it is made from changes. /dev/kvm may be there and
# still not work, so it is used only if a guest has booted with it within seconds; that is tried once a boot of the host.

guest_root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
guest_cache=$guest_root/build/roce

# crc32_generic comes first: rxe asks for it by name, and without it only says that it failed.
guest_modules=(crc32_generic virtio_pci virtio_net virtio_rng 9p 9pnet_virtio overlay dummy veth
	ib_uverbs rdma_ucm rdma_rxe sch_netem sch_tbf)

# The kernel waits for ticks of an emulated timer while it boots, and panics when a busy host lets none come in time.
guest_kernel_options="console=ttyS0 quiet panic=-1 no_timer_check"

guest_skip() {
	echo "skipped: $1"
	return 77
}

# Debian's newest kernel, unpacked. apt knows where it is only after an update.
guest_kernel() {
	local package deb
	rm -rf "$guest_cache/kernel" "$guest_cache/deb"
	mkdir -p "$guest_cache/deb"
	for package in first again; do
		package=$(apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p')
		if [[ -n $package ]] && (cd "$guest_cache/deb" && apt-get download -q "$package"); then
			break
		fi
		apt-get update -q || true
	done
	deb=$(echo "$guest_cache"/deb/*.deb)
	[[ -f $deb ]] || return 1
	dpkg -x "$deb" "$guest_cache/deb/tree" && mv "$guest_cache/deb/tree" "$guest_cache/kernel" &&
		depmod -b "$guest_cache/kernel" "$(ls "$guest_cache/kernel/lib/modules")" && rm -rf "$guest_cache/deb"
}

guest_initramfs() {
	local tree=$guest_cache/initramfs release module file i=100
	release=$(ls "$guest_cache/kernel/lib/modules")
	rm -rf "$tree"
	mkdir -p "$tree"/{bin,modules,proc,sys,dev,host,above,root}
	cp /bin/busybox "$tree/bin/"
	cp "$guest_root/tests/roce/init.sh" "$tree/init"
	chmod +x "$tree/init"
	for module in "${guest_modules[@]}"; do
		modprobe -d "$guest_cache/kernel" -S "$release" --show-depends "$module" || return 1
	done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$tree.order"
	while read -r file; do
		i=$((i + 1))
		cp "$file" "$tree/modules/$i-${file##*/}"
	done <"$tree.order"
	(cd "$tree" && find . -print0 | cpio -0 -o -H newc --quiet | gzip -1) >"$guest_cache/initramfs.gz"
}

guest_image() {
	local stamp
	stamp=$({ declare -p guest_modules && declare -f guest_initramfs && cat "$guest_root/tests/roce/init.sh"; } | sha256sum)
	if [[ $(cat "$guest_cache/stamp" 2>/dev/null) == "$stamp" ]]; then
		return 0
	fi
	rm -f "$guest_cache/stamp" "$guest_cache/accelerator"
	if ! [[ -d $guest_cache/kernel ]]; then
		guest_kernel || return 1
	fi
	guest_initramfs && echo "$stamp" >"$guest_cache/stamp"
}

# Boots with accelerator $1 and powers off at once; succeeds if it did so within $2 seconds.
guest_probe() {
	timeout -k 1 "$2" qemu-system-x86_64 -accel "$1" -cpu max -m 512 -display none -monitor none -serial stdio \
		-no-reboot -kernel "$(echo "$guest_cache"/kernel/boot/vmlinuz-*)" -initrd "$guest_cache/initramfs.gz" \
		-append "$guest_kernel_options probe" </dev/null 2>&1 | grep -q "guest: probe ok"
}

# What the guests run on, "kvm" or "tcg,thread=multi", in guest_accelerator; remembered until the host boots again.
guest_choose() {
	local boot known
	boot=$(cat /proc/sys/kernel/random/boot_id)
	if read -r known guest_accelerator 2>/dev/null <"$guest_cache/accelerator" && [[ $known == "$boot" ]]; then
		return 0
	fi
	guest_accelerator=
	if [[ -w /dev/kvm ]] && guest_probe kvm 10; then
		guest_accelerator=kvm
	elif guest_probe tcg,thread=multi 120; then
		guest_accelerator=tcg,thread=multi
	else
		return 1
	fi
	echo "$boot $guest_accelerator" >"$guest_cache/accelerator"
}

# Everything that guest_run needs. 0, or 77 with the line that says why there can be no guest here.
guest_prepare() {
	local lock
	if [[ $(uname -m) != x86_64 ]]; then
		guest_skip "soft-RoCE guests are for x86_64 hosts, this is $(uname -m)"
		return
	fi
	"$guest_root/deploy/packages.sh" roce >&2 || guest_skip "the packages for a soft-RoCE guest are missing" || return
	mkdir -p "$guest_cache"
	exec {lock}>"$guest_cache/lock"
	flock "$lock"
	if ! guest_image >&2; then
		guest_skip "no kernel image for a guest (see above)"
	elif ! guest_choose; then
		guest_skip "qemu does not boot the guest's kernel here"
	fi
	local rc=$?
	exec {lock}>&-
	return $rc
}

# Arguments of qemu for guest $1 of $2 on network $3 (0: data, 1: control). The first guest is the hub, so that any
# number can be on one wire: it listens on a socket for each of the others.
guest_wire() {
	local i
	printf '%s\n' -netdev "hubport,id=net$3,hubid=$3" \
		-device "virtio-net-pci,netdev=net$3,mac=$(printf '52:54:00:77:%02x:%02x' "$3" "$1")"
	for ((i = 2; i <= $2; i++)); do
		if (($1 == 1)); then
			printf '%s\n' -netdev "stream,id=wire$3.$i,server=on,addr.type=unix,addr.path=$guest_sockets/$3.$i" \
				-netdev "hubport,id=port$3.$i,hubid=$3,netdev=wire$3.$i"
		elif (($1 == i)); then
			printf '%s\n' -netdev "stream,id=wire$3,server=off,addr.type=unix,addr.path=$guest_sockets/$3.$i" \
				-netdev "hubport,id=port$3,hubid=$3,netdev=wire$3"
		fi
	done
}

guest_boot() { # number, guests, seconds, shared directory
	local wires
	mapfile -t wires < <(guest_wire "$1" "$2" 0 && guest_wire "$1" "$2" 1)
	exec timeout -k 2 "$3" qemu-system-x86_64 -accel "$guest_accelerator" -cpu "${GUEST_PROCESSOR:-max,fma=off}" -smp "${GUEST_CPUS:-2}" \
		-m "${GUEST_MEMORY:-2048}" -nodefaults -display none -monitor none -serial "file:$4/serial.$1" -no-reboot \
		-kernel "$(echo "$guest_cache"/kernel/boot/vmlinuz-*)" -initrd "$guest_cache/initramfs.gz" \
		-append "$guest_kernel_options mitigations=off guest=$1" -device virtio-rng-pci \
		-virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap \
		-virtfs "local,path=$4,mount_tag=share,security_model=none,multidevs=remap" "${wires[@]}" \
		</dev/null >"$4/qemu.$1" 2>&1
}

# Of guest_all's shell: whoever still runs, and the sockets.
guest_end() {
	if ((${#guest_pids[@]})); then
		kill "${guest_pids[@]}" || true
	fi
	rm -rf "$guest_sockets"
}

# Boots guests 1 to $1 and waits for them; in a shell of its own, so that its end takes them with it.
guest_all() { # guests, seconds, shared directory
	local i followers=() rc=0 one got prefix=
	guest_pids=()
	guest_sockets=$(mktemp -d /tmp/shardmesh-roce.XXXXXX)
	trap 'guest_end' EXIT
	trap 'exit 130' INT TERM
	for ((i = 1; i <= $1; i++)); do
		: >"$3/out.$i"
		guest_boot "$i" "$@" &
		guest_pids+=($!)
		if (($1 > 1)); then
			prefix="guest $i: "
		fi
		tail -s 0.2 -n +1 -f --pid=$! "$3/out.$i" 2>/dev/null | sed -u "s/^/$prefix/" &
		followers+=($!)
		# The others connect to the first guest's sockets, the last of which is made last.
		for ((got = 0; i == 1 && $1 > 1 && got < 100; got++)); do
			[[ -S $guest_sockets/1.$1 ]] && break
			sleep 0.1
		done
	done
	for ((i = 1; i <= $1; i++)); do
		one=0
		wait "${guest_pids[i - 1]}" || one=$?
		unset "guest_pids[i - 1]"
		wait "${followers[i - 1]}"
		if got=$(cat "$3/rc.$i" 2>/dev/null); then
			one=$got
		elif ((one != 124)); then
			echo "guest $i ended without a word (qemu: $one); the end of its console:"
			tail -n 15 "$3/serial.$i" "$3/qemu.$i" 2>/dev/null
			one=125
			# Nobody need wait for it at a barrier.
			echo "$one" >"$3/rc.$i"
		else
			echo "guest $i: not done within $2 seconds"
		fi
		((rc)) || rc=$one
	done
	return "$rc"
}

guest_run() {
	local guests=1 seconds=300 directory='' option OPTIND=1 rc=0
	while getopts n:t:o: option; do
		case $option in
		n) guests=$OPTARG ;;
		t) seconds=$OPTARG ;;
		o) directory=$OPTARG ;;
		*) return 2 ;;
		esac
	done
	shift $((OPTIND - 1))
	local script=$1 keep=$directory
	directory=${directory:-$guest_cache/out/$(basename "$script" .sh).$BASHPID}
	rm -rf "$directory"
	mkdir -p "$directory"
	directory=$(realpath "$directory")
	cp "$guest_root/tests/roce/boot.sh" "$directory/"
	{
		printf 'export GUESTS=%q SHARDMESH_BIN=%q\n' "$guests" "${SHARDMESH_BIN:-$guest_root/build/release/bin}"
		printf 'cd %q && exec bash' "$guest_root"
		printf ' %q' "$(realpath "$script")" "${@:2}"
		echo
	} >"$directory/start"
	(guest_all "$guests" "$seconds" "$directory") || rc=$?
	if ((rc)); then
		echo "left for a look: $directory"
	elif [[ -z $keep ]]; then
		rm -rf "$directory"
	fi
	return "$rc"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
	set -euo pipefail
	if (($# == 0)) || [[ $1 == --help ]]; then
		sed -n '4,/^$/s/^# \{0,1\}//p' "$0"
		exit $(($# == 0 ? 2 : 0))
	fi
	guest_prepare
	guest_run "$@"
fi
