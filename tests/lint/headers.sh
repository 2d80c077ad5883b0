#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Every header compiles alone, so that nobody has to know what to include before it.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

bad=0
while read -r header; do
	if ! echo "#include \"$header\"" |
		"${CC:-cc}" -std=gnu17 -D_GNU_SOURCE -iquote . -Wall -Wextra -Werror -Wno-unused-function -fsyntax-only -x c -; then
		echo "$header does not compile alone"
		bad=1
	fi
done < <(find base rdma kernels model mesh shardsvc worker meshctl tests -name '*.h')
exit $bad
