#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Every C file is as clang-format leaves it. Names the files that are not; to mend one: clang-format -i FILE.
set -euo pipefail
cd "$(dirname "$0")/../.."
bad=$(find base rdma kernels model mesh shardsvc worker meshctl tests -name '*.[ch]' -print0 |
	{ xargs -0 -r -n 8 -P "$(nproc)" clang-format --dry-run -Werror 2>&1 || true; } |
	sed -n 's/^\([^ :]*\):[0-9]*:.* error: .*/\1/p' | sort | uniq -c)
if [[ -n $bad ]]; then
	printf 'places to mend with clang-format -i:\n%s\n' "$bad"
	exit 1
fi
