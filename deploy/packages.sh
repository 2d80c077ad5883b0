#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# packages.sh build|test|quickstart|roce: installs with apt, on Debian 12, what is missing of
#   build       what the programs are built with and load
#   test        build, and what tests/run.sh needs
#   quickstart  build, and the text that the quickstart trains on
#   roce        build, and what boots a guest with soft-RoCE and measures in it (tests/roce)
# Says what it installs and asks nothing. With neither root nor a sudo that works without a password it prints the line
# to run and exits 2. When everything is there it says nothing and needs no network.
set -euo pipefail

# libdnnl2 and libopenblas0-pthread are loaded at run time; nothing is linked to them.
build=(gcc libc6-dev cmake ninja-build pkg-config libevent-dev libjansson-dev libssl-dev libxxhash-dev
	libpcre2-dev libutf8proc-dev libfabric-dev libibverbs-dev librdmacm-dev libnuma-dev libdnnl2
	libopenblas0-pthread)
test=(clang clang-format clang-tidy libclang-rt-14-dev libcmocka-dev python3 shellcheck)
text=(perl-doc)
roce=(qemu-system-x86 busybox-static cpio kmod iproute2 procps python3 rdma-core ibverbs-providers ibverbs-utils
	rdmacm-utils perftest)

case ${1-} in
build) wanted=("${build[@]}") ;;
test) wanted=("${build[@]}" "${test[@]}") ;;
quickstart) wanted=("${build[@]}" "${text[@]}") ;;
roce) wanted=("${build[@]}" "${roce[@]}") ;;
*)
	echo "usage: $0 build|test|quickstart|roce" >&2
	exit 2
	;;
esac

missing=()
for package in "${wanted[@]}"; do
	# shellcheck disable=SC2016 # the dollar is dpkg-query's
	status=$(dpkg-query -W -f '${db:Status-Abbrev} ${Package}' "$package" 2>/dev/null) || status=
	[[ $status == ii* ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
	exit 0
fi

sudo=()
if (($(id -u) != 0)); then
	if ! sudo -n true 2>/dev/null; then
		echo "packages are missing and this is neither root nor allowed to sudo; run as root:" >&2
		echo "  apt-get update && apt-get install -y --no-install-recommends ${missing[*]}" >&2
		exit 2
	fi
	sudo=(sudo -n)
fi

echo "installing with apt: ${missing[*]}"
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -q
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
