#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# clang-tidy.sh BUILD_DIR: the checks of .clang-tidy over what the programs are made of. The tests are left out: they
# would double the time, and they are run instead.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$1

# clang is told about gcc's own warning flags; it only counts them otherwise.
find base rdma kernels model mesh shardsvc worker meshctl -name '*.c' -print0 |
	while IFS= read -r -d '' file; do
		if grep -qF "/$file\"" "$build/compile_commands.json"; then
			printf '%s\0' "$file"
		fi
	done |
	xargs -0 -r -n 1 -P "$(nproc)" clang-tidy --quiet -p "$build" --extra-arg=-Wno-unknown-warning-option 2>&1 |
	{ grep -v ' warnings\? generated\.$' || true; }
