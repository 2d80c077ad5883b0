#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# run.sh BINARY NAME: lets one libFuzzer target look for SHARDMESH_FUZZ_SECONDS (10), from the seeds in
# tests/fuzz/corpus/NAME and from what earlier runs found, which is kept in build/fuzz/NAME. What fails is written to
# build/fuzz/NAME.KIND-HASH, tried first by every later run, and kept until it fails no more.
set -euo pipefail
binary=$(realpath "$1")
name=$2
cd "$(dirname "$0")/../.."
kept=build/fuzz/$name
seeds=tests/fuzz/corpus/$name
limits=(-timeout=10 -rss_limit_mb=2048)
mkdir -p "$kept"

fail() { # input
	echo "fuzz $name: FAILED; the input is $PWD/$1"
	echo "fuzz $name: to see it fail again: $binary $PWD/$1"
	exit 1
}

shopt -s nullglob
for old in "$kept".*; do
	echo "fuzz $name: trying $old, which failed before"
	"$binary" "${limits[@]}" "$old" || fail "$old"
	mv "$old" "$kept/"
done

dirs=("$kept")
if [[ -d $seeds ]]; then
	dirs+=("$seeds")
fi
rc=0
"$binary" -max_total_time="${SHARDMESH_FUZZ_SECONDS:-10}" "${limits[@]}" -artifact_prefix="$kept." "${dirs[@]}" || rc=$?
for new in "$kept".*; do
	fail "$new"
done
if ((rc != 0)); then
	echo "fuzz $name: FAILED with exit status $rc and left no input; the corpus is $PWD/$kept"
fi
exit "$rc"
