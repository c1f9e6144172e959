#!/usr/bin/env bash
# Runs the CPU tests with the packages that `make sanitize` built: tools/sanitize.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
library() { g++ -print-file-name="$1"; }

# tests VARIANT ARGUMENTS...: pytest with the package of that variant. PYTHONSAFEPATH keeps the tree's own pyseg away. The
# process ends without Python's last collection of garbage, which takes longer under a sanitizer than many tests.
tests() {
  local site=$PWD/build/$1/site
  shift
  PYTHONPATH=$site PYTHONSAFEPATH=1 "$python" -c '
import os, sys, pytest
status = pytest.main(sys.argv[1:])
sys.stdout.flush()
os._exit(status)' -o pythonpath="$site" -o addopts= -q -p no:cacheprovider -m "not cuda" "$@"
}

# Left out everywhere: tests of sizes that take minutes in instrumented code, of the choice among CPU targets (these
# builds have one), of memory use (a sanitizer's own counts too).
slow="test_large or backward_large or 2048 or cpu_capability or cpu_target or memory_is_given_back or compile or export or opcheck"
# The operators' own tests; those of the Python layers above them call the same kernels.
operators=(
  tests/conv
  tests/crf/test_permutohedral_lattice.py
  tests/crf/test_permutohedral_filter.py
  tests/crf/test_gaussian_filter.py
  tests/crf/test_mean_field.py
  tests/crf/test_sparse_pairwise.py
  tests/distance/test_distance_transform.py
  tests/loss/test_segmentation_statistics.py
  tests/loss/test_pixel_cross_entropy.py
  tests/loss/test_expectation_labels.py
  tests/loss/test_hausdorff_dt.py
  tests/loss/test_lovasz_statistics.py
  tests/loss/test_log_sum.py
  tests/loss/test_point_supervision_loss.py
  tests/metric/test_confusion_matrix.py
  tests/roi/test_roi_align.py
  tests/roi/test_paste_masks.py
  tests/roi/test_nms.py
  tests/upsample
  tests/warp
)

# Both at once: neither keeps two processors busy.
gcc -O1 -shared -fPIC tools/tsan_gomp.c -o build/thread/tsan_gomp.so
# Threads: each path, dense and depthwise, forward and backward, in each layout and dtype.
LD_PRELOAD="$(library libtsan.so) $PWD/build/thread/tsan_gomp.so" \
  TSAN_OPTIONS=halt_on_error=1 \
  tests thread "${operators[@]}" -k "(devices or dtypes or layouts or threads) and not ($slow)" \
  >build/thread/output.txt 2>&1 &
thread=$!

echo "sanitize: address, undefined"
status=0
# libstdc++ is preloaded too, or the sanitizer does not find the function that throws exceptions.
LD_PRELOAD="$(library libasan.so) $(library libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  tests address "${operators[@]}" -k "not ($slow)" || status=$?

echo "sanitize: thread"
wait "$thread" || status=$?
cat build/thread/output.txt
exit "$status"
