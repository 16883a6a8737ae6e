#!/usr/bin/env bash
# Print the first of these Pythons that can make an environment; one error says what the machine
# lacks. torch compiles C++ that includes Python.h while it serves.
set -u

[[ $OSTYPE == linux* ]] || {
  echo "The engines' CPU builds are for Linux (on Windows: WSL)" >&2
  exit 1
}

lacks() {
  echo "$1. On Debian and Ubuntu: sudo apt install make g++ python3-venv python3-dev libnuma1" >&2
  exit 1
}

${CXX:-c++} -std=c++20 -fsyntax-only -x c++ - 2> /dev/null << 'END' ||
#include <concepts>
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#error older than what the kernels are tested with
#endif
END
  lacks "No C++20 compiler: ${CXX:-c++} is not GCC 12 or newer, nor Clang (another: make CXX=g++-12)"

for python in "$@"; do
  "$python" - 2> /dev/null << 'END' || continue
import ensurepip, pathlib, sys, sysconfig
header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
sys.exit(not (3, 11) <= sys.version_info < (3, 14) or not header.is_file())
END
  "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2> /dev/null ||
    lacks "No libnuma.so.1, which vLLM's CPU build loads"
  "$python" - << 'END' || exit
import shutil, sys
free = shutil.disk_usage(".").free / 1e9
if free < 4:
    sys.exit(f"An environment takes 4 GB here (make test: 8), and {free:.1f} GB are free")
END
  echo "$python"
  exit
done
lacks "No Python 3.11, 3.12 or 3.13 with venv and Python.h: tried $* (another: make PYTHON=python3.13, \
which for instance uv python install 3.13 brings)"
