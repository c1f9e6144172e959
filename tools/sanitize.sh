#!/usr/bin/env bash
# Runs the CPU tests with the packages that `make sanitize` built: tools/sanitize.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
library() { g++ -print-file-name="$1"; }

# Address and undefined behaviour: all CPU tests of the operators, of each kind of input.
# libstdc++ is preloaded too, or the sanitizer does not find the function that throws exceptions.
tests() {
  local site=$PWD/build/$1/site
  shift
  # Under PYTHONSAFEPATH the tree's own pyseg is not imported, here or in a child process.
  PYTHONPATH=$site PYTHONSAFEPATH=1 "$python" -m pytest -o pythonpath="$site" -o addopts= -q -p no:cacheprovider \
    -m "not cuda" "$@"
}

echo "sanitize: address, undefined"
LD_PRELOAD="$(library libasan.so) $(library libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  tests address tests/conv

# Threads: one test of each path is enough, as every path has few parallel loops.
echo "sanitize: thread"
gcc -O1 -shared -fPIC tools/tsan_gomp.c -o build/thread/tsan_gomp.so
LD_PRELOAD="$(library libtsan.so) $PWD/build/thread/tsan_gomp.so" \
  TSAN_OPTIONS=halt_on_error=1 \
  tests thread tests/conv
