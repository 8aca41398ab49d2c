#!/usr/bin/env bash
# Whether compute-sanitizer, called as bench/gpu.sh calls it, finds faults at all: those of bench/planted.cu.
#
#   bash bench/planted.sh ARCH FOLDER [OPTION...]     e.g. sm_90 build/gpu --error-exitcode 9
#
# Exit status: 0 if every tool found its fault (and each program runs without a tool), else 1.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
arch=$1 program=$2/planted
shift 2

"${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" -arch="$arch" -o "$program" bench/planted.cu || exit 1
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
