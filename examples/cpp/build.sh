#!/usr/bin/env bash
# Builds generate.cpp, which includes tyir.hpp, with the headers and libraries that the Python packages apache-tvm and apache-tvm-ffi bring along.
# Usage: examples/cpp/build.sh PROGRAM      $CXX is the compiler (default g++), `python` the one that tyir is installed in
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
package() { python -c "import importlib.util, os; print(os.path.dirname(importlib.util.find_spec('$1').origin))"; }
ffi=$(package tvm_ffi) tvm=$(package tvm)
mkdir -p -- "$(dirname -- "$1")"
# libtvm_runtime has the threads that kernels run on; they name none of its symbols before they are loaded
"${CXX:-g++}" -std=c++17 -O2 "$here/generate.cpp" -o "$1" -I"$ffi/include" -L"$ffi/lib" -L"$tvm/lib" \
  -Wl,--no-as-needed -ltvm_ffi -ltvm_runtime -Wl,-rpath,"$ffi/lib:$tvm/lib"
