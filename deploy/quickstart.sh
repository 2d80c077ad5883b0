#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# quickstart.sh [TEXT FILES...]: installs what is missing (Debian 12), builds, and trains a byte-level GPT through a
# coordinator, 4 shard services and 2 workers on this machine; then lets it write. The text is the English of Debian's
# perl-doc (Perl's manual pages), or the files given. Everything it makes is under build/.
set -euo pipefail

texts=()
reader="cat"
for file in "$@"; do
	if [[ ! -r $file ]]; then
		echo "quickstart.sh: cannot read '$file'; usage: $0 [TEXT FILES...]" >&2
		exit 2
	fi
	texts+=("$(readlink -f "$file")")
done

cd "$(dirname "$0")/.."
if ((${#texts[@]})); then
	bash deploy/packages.sh build
else
	bash deploy/packages.sh quickstart
	# Manual pages only: the unicode tables, the generated index and the release notes are hardly English.
	mapfile -t texts < <(dpkg -L perl-doc | grep '/pod/perl.*\.pod$' |
		grep -Ev 'perl(uniprops|toc|api|intern|[0-9]+delta|modlib)\.pod$' | sort)
	reader="pod2text" # the pages as people read them, without their markup
fi

echo "== build"
mkdir -p build/quickstart
cmake --preset release >build/quickstart/configure.log
cmake --build --preset release --target meshctl shardsvc worker -- --quiet

work=build/quickstart
for text in "${texts[@]}"; do "$reader" "$text"; done >"$work/text.txt"
cp deploy/quickstart.json "$work/quickstart.json"
rm -rf "$work/run"
echo "== train on $(stat -c %s "$work/text.txt") bytes from ${#texts[@]} files"
build/release/bin/meshctl run --config "$work/quickstart.json"

echo "== what it writes"
build/release/bin/meshctl generate --model "$work/run/model" --prompt "The " --tokens 400 --temperature 0.8 --top-k 40 --seed 1

cat <<END

== worth trying next
  build/release/bin/meshctl generate --model $work/run/model --prompt "If you want to " --tokens 200 --temperature 0.7
  build/release/bin/meshctl run --config $work/quickstart.json --shards 3 --workers 1 --run-dir $work/again   # same bits
  build/release/bin/meshctl status --run-dir $work/again   # in another terminal, while it runs
END
