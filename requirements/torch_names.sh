#!/usr/bin/env bash
# torch_names.sh COMPILER LIBRARY FOLDER: write FOLDER/libtorch_cpu.so for the compiler's processor,
# with the C functions that LIBRARY has, all empty: the linker only asks for their names.
set -euo pipefail
mkdir -p "$3"
nm -D --defined-only "$2" | awk '$3 ~ /^(aoti_)?torch_/ {print ".globl " $3 "\n" $3 ":"}' \
  > "$3/names.s"
"$1" -shared -nostdlib -Wl,-soname,libtorch_cpu.so "$3/names.s" -o "$3/libtorch_cpu.so"
