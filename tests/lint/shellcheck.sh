#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "$0")/../.."
find .ci/run deploy tests -type f \( -name '*.sh' -o -path .ci/run \) -print0 | xargs -0 shellcheck -x
