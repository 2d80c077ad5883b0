#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# The arrows between folders, held by what each file includes:
#   a library includes base alone, mesh also model; a program the libraries; meshctl also the other programs' contracts;
#   of another folder only its contract header; nobody meshctl's; and a library only the outside libraries it owns.
# Tests may look inside what they test, so tests/ is left out. Prints what is wrong as file:line, exits 1 if anything is.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Relative paths from file $1 in the folder of another file; prints the folder that include $2 of file $1 lands in.
folder_of() {
	local first=${2%%/*}
	case $first in
	base | rdma | kernels | model | mesh | shardsvc | worker | meshctl | tests) [[ $2 == */* ]] && echo "$first" && return ;;
	esac
	local dir
	dir=$(realpath -m --relative-to=. "$(dirname "$1")/$2")
	echo "${dir%%/*}"
}

contract_of() {
	case $1 in
	rdma) echo rdma/fabric.h ;;
	*) echo "$1/$1.h" ;;
	esac
}

allowed_folders() {
	case $1 in
	base) echo ;;
	rdma | kernels | model) echo base ;;
	mesh) echo base model ;;
	shardsvc | worker) echo base rdma kernels model mesh ;;
	meshctl) echo base rdma kernels model mesh shardsvc worker ;;
	esac
}

# Outside libraries and the one library folder, or two, that may include them. Programs are free.
owners_of() {
	case $1 in
	xxhash.h) echo base ;;
	jansson.h) echo model mesh ;;
	event2/* | openssl/*) echo mesh ;;
	infiniband/* | rdma/*) echo rdma ;;
	oneapi/* | dnnl*.h | cblas.h | cuda*.h | cublas*.h) echo kernels ;;
	*) echo any ;;
	esac
}

bad=0
complain() {
	echo "$1"
	bad=1
}

check_ours() { # file:line, file, include
	local from=${2%%/*} to
	to=$(folder_of "$2" "$3")
	if [[ $to == "$from" ]]; then
		return
	fi
	if [[ " $(allowed_folders "$from") " != *" $to "* ]]; then
		complain "$1: $from may not include $to ($3)"
	elif [[ $3 != $(contract_of "$to") ]]; then
		complain "$1: $3 is private to $to; its contract is $(contract_of "$to")"
	fi
}

check_outside() { # file:line, file, include
	local from=${2%%/*} owners
	case $from in shardsvc | worker | meshctl) return ;; esac
	owners=$(owners_of "$3")
	if [[ $owners != any && " $owners " != *" $from "* ]]; then
		complain "$1: <$3> belongs to: $owners"
	fi
}

while IFS=: read -r file line text; do
	name=${text#*[<\"]}
	name=${name%%[>\"]*}
	if [[ $text == *'"'* ]]; then
		check_ours "$file:$line" "$file" "$name"
	else
		check_outside "$file:$line" "$file" "$name"
	fi
done < <(find base rdma kernels model mesh shardsvc worker meshctl \
	\( -name '*.[ch]' -o -name '*.def' -o -name '*.cu' -o -name '*.cuh' \) \
	-exec grep -nHE '^[[:space:]]*#[[:space:]]*include[[:space:]]*[<"]' {} + || true)
exit $bad
