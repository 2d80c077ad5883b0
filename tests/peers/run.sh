#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# run.sh: the live comparison with PyTorch, transformers and tokenizers. Installs them from PyPI into build/peers/venv (about 5 GB,
# once), builds Release, makes the committed numbers again and compares them, then runs jobs through the whole mesh.
set -euo pipefail
cd "$(dirname "$0")/../.."

bash deploy/packages.sh test
venv=build/peers/venv
if ! "$venv/bin/python" -c 'import tokenizers, torch, transformers' 2>/dev/null; then
	echo "== installing torch and transformers into $venv"
	mkdir -p build/peers
	python3 -m venv "$venv"
	"$venv/bin/pip" install -q torch transformers tokenizers numpy safetensors
fi
cmake --preset release >build/peers/configure.log
cmake --build --preset release -- --quiet

export SHARDMESH_BIN=$PWD/build/release/bin
"$venv/bin/python" tests/peers/make_numbers.py build/peers/gpt2_small.safetensors
build/release/tests/test_peers_numbers build/peers/gpt2_small.safetensors
"$venv/bin/python" tests/peers/make_llama.py build/peers
build/release/tests/test_peers_llama build/peers
"$venv/bin/python" tests/peers/make_rope.py build/peers/rope.json
build/release/tests/test_model_rope build/peers/rope.json
"$venv/bin/python" tests/peers/make_tokenizers.py build/peers/tokenizers
build/release/tests/test_model_tokenizer build/peers/tokenizers
"$venv/bin/python" tests/peers/live.py
