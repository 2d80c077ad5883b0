#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# step.sh [--peers] [--json] [--where] [--runs N]: seconds of a training step of GPT-2 124M on this machine: the floor
# of its matrix products, one worker, two workers, with --peers PyTorch, FSDP2 and DeepSpeed, all in turn in one run.
# --help says more. What it makes is under build/bench and build/peers.
set -euo pipefail
cd "$(dirname "$0")/../.."

bash deploy/packages.sh build >&2
cmake --preset release >/dev/null
cmake --build --preset release --target meshctl shardsvc worker floor where -- --quiet >&2
exec python3 tests/bench/step.py "$@"
