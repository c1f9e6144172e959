#!/usr/bin/env bash
# Installs pydensecrf2, which the dense CRF is compared with, for the Python that is named.
#
# It comes as source only, and its build breaks with newer build tools than these. pip cannot be told requirements for
# the build of one package, so they go into a folder that is forgotten, and the build sees them there. About 30 s.
set -euo pipefail
python=$1
"$python" -c 'import pydensecrf.densecrf' 2>/dev/null && exit 0

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"$python" -m pip install --quiet --quiet --disable-pip-version-check --target "$tools" \
  'setuptools<81' 'cython==0.29.37' wheel
PYTHONPATH="$tools" "$python" -m pip install --quiet --quiet --disable-pip-version-check --no-build-isolation --no-deps \
  pydensecrf2==1.1
"$python" -c 'import pydensecrf.densecrf'
