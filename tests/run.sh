#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# run.sh [--quick|--all]: installs what the tests need, builds, and runs everything that needs no GPU. The last thing
# printed is ctest's summary, over all builds; the exit status is ctest's. Results as JUnit: build/all/results.xml.
#   --quick  release build: lint, unit tests and those labelled quick (at most 2 minutes)
#   default  also the sanitizer builds, fuzzing and clang-tidy (at most 25 minutes)
#   --all    also what is labelled long, a minute of fuzzing a target, and gcc's sanitizer of undefined behaviour
set -euo pipefail
cd "$(dirname "$0")/.."

presets=(release asan tsan)
select=(-LE '^long$')
case ${1-} in
--quick)
	presets=(release)
	select+=(-L '^(build|lint|unit|quick)$')
	;;
--all)
	presets+=(ubsan)
	select=()
	export SHARDMESH_FUZZ_SECONDS=${SHARDMESH_FUZZ_SECONDS:-60}
	;;
'') ;;
*)
	echo "usage: $0 [--quick|--all]" >&2
	exit 2
	;;
esac

bash deploy/packages.sh test

# A build that fails must not keep the others from being tested, nor pass unseen: everything that can be built is, and
# the summary has a test build.PRESET that builds again (nothing to do when all is well) and fails with the errors.
mkdir -p build/all
tests=build/all/CTestTestfile.cmake
: >"$tests"
for preset in "${presets[@]}"; do
	echo "== $preset: build"
	cmake --preset "$preset" >"build/all/configure-$preset.log" 2>&1 || cat "build/all/configure-$preset.log"
	cmake --build --preset "$preset" -- -k 0 --quiet || echo "== $preset: the build failed"
	cat >>"$tests" <<END
add_test(build.$preset cmake --build "$PWD/build/$preset")
set_tests_properties(build.$preset PROPERTIES LABELS build RUN_SERIAL TRUE)
subdirs("$PWD/build/$preset")
END
done

# Where the kernel spreads addresses over more than 28 bits, the sanitizers' shadow memory of these compilers does not
# fit between them; there the tests run without the spreading.
run=()
if (($(cat /proc/sys/vm/mmap_rnd_bits 2>/dev/null || echo 28) > 28)) && setarch -R true 2>/dev/null; then
	run=(setarch -R)
fi

echo "== tests"
exec "${run[@]}" ctest --test-dir build/all -j "$(nproc)" --output-on-failure --no-tests=error \
	--output-junit "$PWD/build/all/results.xml" "${select[@]}"
