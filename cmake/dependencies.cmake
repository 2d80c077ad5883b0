# SPDX-License-Identifier: Apache-2.0
#
# What the tree is built with; deploy/packages.sh installs it. oneDNN and OpenBLAS are not here: they are loaded at run
# time, after the math profile has been imposed on their environment.
find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(LIBEVENT REQUIRED IMPORTED_TARGET libevent libevent_pthreads)
pkg_check_modules(NUMA REQUIRED IMPORTED_TARGET numa)
pkg_check_modules(CRYPTO REQUIRED IMPORTED_TARGET libcrypto)

# The networks. One that is left out is not in the build: --fabric auto says so and takes another.
option(SHARDMESH_OFI "the fabric provider ofi, with libfabric" ON)
if(SHARDMESH_OFI)
	pkg_check_modules(LIBFABRIC REQUIRED IMPORTED_TARGET libfabric)
endif()
option(SHARDMESH_VERBS "the fabric provider verbs, with libibverbs and librdmacm" ON)
if(SHARDMESH_VERBS)
	pkg_check_modules(VERBS REQUIRED IMPORTED_TARGET libibverbs librdmacm)
endif()

# Tests are built where cmocka is there (deploy/packages.sh test); the programs do not need it.
pkg_check_modules(CMOCKA IMPORTED_TARGET cmocka)
if(NOT CMOCKA_FOUND)
	message(STATUS "no cmocka: unit tests are left out (deploy/packages.sh test installs it)")
endif()
