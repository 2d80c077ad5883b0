#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
echo "there is no GPU test yet: the only kernels are those for the CPU, which tests/run.sh covers"
