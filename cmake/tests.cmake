# SPDX-License-Identifier: Apache-2.0
#
# How tests are registered.
#
# Labels say what a test is: unit, sim, integration, fuzz, lint; and when it runs besides tests/run.sh's default:
#   quick     an integration or sim test that tests/run.sh --quick takes too
#   sanitize  also runs in the sanitizer builds (unit tests always do)
#   long      only tests/run.sh --all
# A sanitizer build registers only what runs there, under names that begin with the sanitizer, so that one ctest can
# run several builds and still say which one failed.
enable_testing()

set(shardmesh_prefix_address asan.)
set(shardmesh_prefix_thread tsan.)
set(shardmesh_prefix_undefined ubsan.)

# shardmesh_test(<name> LABELS <label>... TIMEOUT <seconds> [PROPERTIES <ctest property> <value>...] COMMAND <argv>...)
# The test finds the programs by SHARDMESH_BIN and the sources by SHARDMESH_SOURCE.
function(shardmesh_test name)
	cmake_parse_arguments(PARSE_ARGV 1 t "" "TIMEOUT" "LABELS;PROPERTIES;COMMAND")
	if(t_UNPARSED_ARGUMENTS OR NOT t_TIMEOUT OR NOT t_LABELS OR NOT t_COMMAND)
		message(FATAL_ERROR "shardmesh_test(${name}): needs LABELS, TIMEOUT and COMMAND, got ${ARGN}")
	endif()
	set(in_sanitizers ${t_LABELS})
	list(FILTER in_sanitizers INCLUDE REGEX "^(unit|sanitize|fuzz)$")
	if(SHARDMESH_SANITIZE AND NOT in_sanitizers)
		return()
	endif()
	set(full ${shardmesh_prefix_${SHARDMESH_SANITIZE}}${name})
	add_test(NAME ${full} COMMAND ${t_COMMAND})
	set(env SHARDMESH_BIN=${CMAKE_BINARY_DIR}/bin SHARDMESH_SOURCE=${CMAKE_SOURCE_DIR}
		ASAN_OPTIONS=detect_leaks=1:abort_on_error=1
		UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
		TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1)
	set_tests_properties(${full} PROPERTIES LABELS "${t_LABELS}" TIMEOUT ${t_TIMEOUT} ENVIRONMENT "${env}")
	# An integration test is several busy processes: on two cores nothing else runs beside it.
	if("integration" IN_LIST t_LABELS)
		set_tests_properties(${full} PROPERTIES PROCESSORS 2)
	endif()
	if(t_PROPERTIES)
		set_tests_properties(${full} PROPERTIES ${t_PROPERTIES})
	endif()
endfunction()

# shardmesh_unit_test(<name> <library>...): tests/unit/test_<name>.c, with cmocka, as the ctest test unit.<name>.
function(shardmesh_unit_test name)
	if(NOT CMOCKA_FOUND)
		return()
	endif()
	add_executable(test_${name} ${CMAKE_SOURCE_DIR}/tests/unit/test_${name}.c)
	target_link_libraries(test_${name} PRIVATE ${ARGN} PkgConfig::CMOCKA Threads::Threads m)
	set_target_properties(test_${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
	shardmesh_test(unit.${name} LABELS unit TIMEOUT 120 COMMAND test_${name})
endfunction()

# shardmesh_fuzz_test(<name> <library>...): tests/fuzz/fuzz_<name>.c, a libFuzzer target, in the asan build only. How
# long it looks, what it starts from and where it leaves what it finds: tests/fuzz/run.sh.
function(shardmesh_fuzz_test name)
	if(NOT SHARDMESH_FUZZ)
		return()
	endif()
	add_executable(fuzz_${name} ${CMAKE_SOURCE_DIR}/tests/fuzz/fuzz_${name}.c)
	target_compile_options(fuzz_${name} PRIVATE -Wno-missing-prototypes)
	target_link_libraries(fuzz_${name} PRIVATE ${ARGN} Threads::Threads m)
	target_link_options(fuzz_${name} PRIVATE -fsanitize=fuzzer)
	set_target_properties(fuzz_${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
	shardmesh_test(fuzz.${name} LABELS fuzz TIMEOUT 300
		COMMAND ${CMAKE_SOURCE_DIR}/tests/fuzz/run.sh $<TARGET_FILE:fuzz_${name}> ${name})
endfunction()

# The scripts of tests/lint. Analysis takes minutes, so --quick leaves it out (label analysis instead of lint).
function(shardmesh_lint_tests)
	if(SHARDMESH_SANITIZE)
		return()
	endif()
	foreach(check arrows banned format headers packages shellcheck)
		shardmesh_test(lint.${check} LABELS lint TIMEOUT 120 COMMAND ${CMAKE_SOURCE_DIR}/tests/lint/${check}.sh)
	endforeach()
	shardmesh_test(analysis.clang_tidy LABELS analysis TIMEOUT 600 PROPERTIES RUN_SERIAL TRUE
		COMMAND ${CMAKE_SOURCE_DIR}/tests/lint/clang_tidy.sh ${CMAKE_BINARY_DIR})
endfunction()
