#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# roce.sh [RUNS]: verbs against perftest in a soft-RoCE guest, whose processor is emulated: only the ratios mean
# anything. Reads against ib_read_bw and pushes against ib_write_bw at 64 KiB and 1 MiB, in turn, medians of RUNS (5);
# and a GPT-2 block in pages from 4 owners against one contiguous read of as many bytes.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/roce/guest.sh
. tests/roce/guest.sh

guest_prepare
cmake --preset release >/dev/null
cmake --build --preset release --target meshctl -- --quiet >&2
SHARDMESH_BIN=$PWD/build/release/bin guest_run -t 900 -o build/roce/bench tests/roce/measure.sh "${1:-5}" pages
python3 tests/roce/ratios.py build/roce/bench/measured
