#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# deploy/packages.sh with everything there, and with nothing there and no way to install it: dpkg-query, id and sudo
# are stand-ins, apt-get must not be reached.
set -euo pipefail
cd "$(dirname "$0")/../.."
fake=$(mktemp -d)
trap 'rm -rf "$fake"' EXIT

stand_in() { # name, body
	printf '#!/bin/sh\n%s\n' "$2" >"$fake/$1"
	chmod +x "$fake/$1"
}
fail() {
	echo "$1"
	exit 1
}
stand_in apt-get 'echo "apt-get was called" >&2; exit 99'
stand_in id 'echo 1000'
stand_in sudo 'exit 1'

# shellcheck disable=SC2016
stand_in dpkg-query 'for p; do :; done; echo "ii $p"'
out=$(PATH="$fake:$PATH" deploy/packages.sh test) || fail "failed although nothing is missing: $out"
[[ -z $out ]] || fail "has something to say although nothing is missing: $out"

stand_in dpkg-query 'exit 1'
rc=0
out=$(PATH="$fake:$PATH" deploy/packages.sh build 2>&1) || rc=$?
((rc == 2)) || fail "exit $rc instead of 2 without root and sudo: $out"
grep -qE 'apt-get install .*\bcmake\b.*\blibevent-dev\b' <<<"$out" || fail "the line to run is missing: $out"

rc=0
PATH="$fake:$PATH" deploy/packages.sh everything >/dev/null 2>&1 || rc=$?
((rc == 2)) || fail "exit $rc instead of 2 for an unknown set"
