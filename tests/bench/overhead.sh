#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# overhead.sh [--runs N]: what the mesh costs: a training step of GPT-2 124M through 1 shard service and 1 worker
# against the same kernels in a bare loop, in turn. What it makes is under build/bench.
set -euo pipefail
cd "$(dirname "$0")/../.."

bash deploy/packages.sh build >&2
cmake --preset release >/dev/null
cmake --build --preset release --target meshctl shardsvc worker bare -- --quiet >&2
exec python3 tests/bench/overhead.py "$@"
