#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=dash
#
# init.sh: first process of the guest, from the initramfs that guest.sh makes. Loads the modules in the order of their
# names, lays a tmpfs over the host's read-only root, so that a script may write anywhere and nothing of it stays, and
# hands over to boot.sh on the share. With "probe" on the kernel's command line it only says that it came this far.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev

give_up() {
	echo "guest: $1"
	poweroff -f
}

case " $(cat /proc/cmdline) " in
*" probe "*) give_up "probe ok" ;;
esac

for module in /modules/*; do
	insmod "$module" || give_up "cannot load $module"
done

mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /host || give_up "no root from the host"
mount -t tmpfs -o size=80% tmpfs /above || give_up "no tmpfs"
mkdir /above/new /above/work
mount -t overlay -o lowerdir=/host,upperdir=/above/new,workdir=/above/work overlay /root || give_up "no overlay"

mkdir -p /root/guest /root/tmp /root/run
mount -t tmpfs tmpfs /root/run
# No cache: guests see at once what the host or another guest wrote.
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none share /root/guest || give_up "no share"
for place in dev proc sys; do
	mount --move /$place /root/$place || give_up "cannot move /$place"
done
mkdir -p /root/dev/shm /root/dev/pts
mount -t tmpfs tmpfs /root/dev/shm
mount -t devpts devpts /root/dev/pts
exec switch_root /root /bin/bash /guest/boot.sh
