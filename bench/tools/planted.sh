#!/usr/bin/env bash
# Checks that compute-sanitizer, with the options of bench/gpu.sh, finds the faults of bench/tools/planted.cu.
#
#   bash bench/tools/planted.sh ARCH FOLDER [OPTION...]     e.g. sm_90 build/gpu --error-exitcode 9
#
# Exit status: 0 if every tool finds its fault, else 1.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
arch=$1 program=$2/planted
shift 2

"${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" -arch="$arch" -o "$program" bench/tools/planted.cu || exit 1
missed=0
for tool in memcheck racecheck synccheck; do
  compute-sanitizer --tool "$tool" "$@" "$program" "$tool"
  status=$?
  if [[ $status == 9 ]]; then
    echo "$tool finds the planted fault"
  else
    echo "$tool does not find the planted fault: exit status $status"
    missed=1
  fi
done
((missed)) && echo "a tool missed its fault" || echo "each of the three tools finds its planted fault"
exit "$missed"
