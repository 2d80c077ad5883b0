#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Functions that cannot be used safely: unbounded copies, conversions that hide errors, hidden static buffers, a hidden
# random state. And a library never ends the process. Prints what it finds as file:line, exits 1 if anything.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

everywhere='strcpy|strcat|stpcpy|sprintf|vsprintf|strtok|gets|atoi|atol|atoll|atof|gmtime|localtime|ctime|asctime|rand|srand|alloca'
libraries='exit|_exit|_Exit|quick_exit|abort'

bad=0
look() { # pattern, folders...
	local pattern=$1
	shift
	if find "$@" \( -name '*.[ch]' -o -name '*.cu' \) -exec grep -nHE "(^|[^_[:alnum:]\"])($pattern)\(" {} +; then
		bad=1
	fi
}
look "$everywhere" base rdma kernels model mesh shardsvc worker meshctl tests
look "$libraries" base rdma kernels model mesh
exit $bad
