#!/usr/bin/env bash
# Everything that needs a GPU: `bash bench/gpu.sh first`, then `bash bench/gpu.sh second`. See bench/gpu.py.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m bench.gpu "$@"
