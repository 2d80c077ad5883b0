# SPDX-License-Identifier: Apache-2.0
#
# Flags of the whole tree. Floating point: results must have the same bits on every machine, so nothing is contracted
# and there is no -ffast-math; -fno-math-errno changes no value, it only lets sqrt be an instruction.
add_compile_definitions(_GNU_SOURCE)
add_compile_options(-Wall -Wextra -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wformat-security -Wshadow -Werror
	-fno-common -ffp-contract=off -fno-math-errno)
# gcc guesses that a bounded print might cut its text; cutting is what the bound is for.
if(CMAKE_C_COMPILER_ID STREQUAL "GNU")
	add_compile_options(-Wno-format-truncation)
endif()

# Asserts stay on in every build: no -DNDEBUG anywhere.
set(CMAKE_C_FLAGS_DEBUG "-O1 -g -fno-omit-frame-pointer")
set(CMAKE_C_FLAGS_RELEASE "-O3 -g")
if(NOT CMAKE_BUILD_TYPE)
	set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug or Release" FORCE)
endif()

# Set by the presets asan, tsan, ubsan.
set(SHARDMESH_SANITIZE "" CACHE STRING "address (with undefined), thread, undefined; empty for none")
if(SHARDMESH_SANITIZE)
	# The two do not disturb each other, and one build less is minutes less.
	set(shardmesh_sanitizers ${SHARDMESH_SANITIZE})
	if(SHARDMESH_SANITIZE STREQUAL "address")
		set(shardmesh_sanitizers address,undefined)
	endif()
	add_compile_options(-fsanitize=${shardmesh_sanitizers} -fno-sanitize-recover=all)
	add_link_options(-fsanitize=${shardmesh_sanitizers})
endif()

# The fuzzers need the coverage of the code they drive; this costs the other tests of that preset little.
if(SHARDMESH_SANITIZE STREQUAL "address" AND CMAKE_C_COMPILER_ID STREQUAL "Clang")
	set(SHARDMESH_FUZZ ON)
	add_compile_options(-fsanitize=fuzzer-no-link)
endif()
