#!/usr/bin/env bash
# Everything that wants a GPU, in one go and without network: build, tests, compute-sanitizer, bench, hardware counters.
#
#   bash bench/gpu.sh                    with python3 as it is (make gpu prepares an environment first)
#   RESULTS=DIR                          where the results go (default: bench/results/gpu-<date>): at most 8 small files
#   PYTHON=python3                       must have torch, setuptools, ninja, pytest, hypothesis, matplotlib
#   BENCH=quick|default|full             how much the bench measures (default: quick)
#   SANITIZE=full|quick                  how many calls run under compute-sanitizer (default: full)
#   STEPS="build tests ..."              only these (default: all, see below)
#   TOTAL=570                            seconds for all steps together: what does not fit is cut, and said to be
#   MAX_JOBS=N                           compilers at a time (default: the cores)
#
# Each step has its own log (build/gpu/<step>.log) and exit status. One that fails does not stop the others; one that
# needs what is not there (a GPU, ncu) is skipped with the reason. Exit status: 0 if no step failed, else 1.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-bench/results/gpu-$(date +%F)}
BENCH=${BENCH:-quick}
SANITIZE=${SANITIZE:-full}
STEPS=${STEPS:-build registers check tests planted memcheck racecheck synccheck bench fused tiny ncu}
TOTAL=${TOTAL:-570}
export MAX_JOBS=${MAX_JOBS:-$(nproc --all)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

LOGS=build/gpu
SKIPPED=77 # the exit status by which a step says that it cannot run here; the last line of its log says why
rm -rf "$LOGS"
mkdir -p "$LOGS" "$RESULTS"

case $BENCH in
  quick) bench_options=(--quick) ;;
  default) bench_options=() ;;
  full) bench_options=(--full) ;;
  *) echo "BENCH is quick, default or full, not $BENCH" >&2; exit 1 ;;
esac
case $SANITIZE in
  quick) sanitize_options=(--quick) ;;
  full) sanitize_options=() ;;
  *) echo "SANITIZE is full or quick, not $SANITIZE" >&2; exit 1 ;;
esac

# "9.0" of the first GPU; nothing, with the reason on stderr, where torch cannot use one.
capability=$("$PYTHON" - 2> "$LOGS/no-gpu" << 'EOF'
import sys
import torch
if torch.version.cuda is None:
    sys.exit(f"torch {torch.__version__} is built without CUDA")
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
print("{}.{}".format(*torch.cuda.get_device_capability()))
EOF
)
no_gpu=$(tail -n 1 "$LOGS/no-gpu")
if [[ -z $capability ]]; then
  # Nothing will run on it: one architecture is enough to see that the kernels compile.
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
  arch=sm_90
else
  arch=sm_${capability/./}
fi

started=$SECONDS
rows=()
failed=0

# step NAME SECONDS cpu|gpu COMMAND...
step() {
  local name=$1 limit=$2 needs=$3
  shift 3
  [[ " $STEPS " == *" $name "* ]] || return 0
  local log=$LOGS/$name.log status=0 verdict note='' begin=$SECONDS left=$((TOTAL - SECONDS + started))
  if [[ $needs == gpu && -z $capability ]]; then
    rows+=("| $name | skipped | 0 | $no_gpu |")
    echo "== $name: skipped: $no_gpu"
    return 0
  fi
  if ((left < 5)); then
    rows+=("| $name | FAILED | 0 | no time left of $TOTAL s |")
    echo "== $name: no time left of $TOTAL s"
    failed=1
    return 0
  fi
  ((limit = limit < left ? limit : left))
  echo "== $name: $*"
  timeout --kill-after=5 "$limit" "$@" > "$log" 2>&1 < /dev/null || status=$?
  case $status in
    0) verdict=passed ;;
    "$SKIPPED") verdict=skipped ;;
    124 | 137) verdict=FAILED note="cut off after $limit s" ;;
    *) verdict=FAILED note="exit status $status" ;;
  esac
  [[ $verdict == FAILED ]] && failed=1
  # The last line that says something: a test's count, a sanitizer's summary, the reason for skipping.
  note+=${note:+; }$(tr '\r' '\n' < "$log" | grep "${tells[$name]:-[^[:space:]]}" | tail -n 1 | tr '|' '/' | cut -c 1-160)
  rows+=("| $name | $verdict | $((SECONDS - begin)) | $note |")
  echo "   $verdict after $((SECONDS - begin)) s: $note"
}

# Only the package's kernels (namespace bnk) are instrumented.
sanitizer_options=(--error-exitcode 9 --kernel-name kns=bnk)

sanitizer() {
  local tool=$1
  shift
  if [[ -n $capability ]] && ! command -v compute-sanitizer > /dev/null; then
    set -- bash -c "echo 'compute-sanitizer is not on PATH'; exit $SKIPPED"
  fi
  step "$tool" 120 gpu "$@"
}

# Without torch's caching allocator, so that each tensor is an allocation of its own with an end to run over.
sanitize() {
  sanitizer "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" "${sanitizer_options[@]}" \
    "$PYTHON" -m bench.sanitize "${sanitize_options[@]}"
}

# The line of a step's log that says most, where it is not the last one (a pattern of grep).
declare -A tells=([build]='^bnkernels: building' [registers]='use local memory$' [check]=' cases ' [bench]='^- against' [fused]='^- against' [tiny]='^- against')

step build 240 cpu "$PYTHON" setup.py -q build_ext --inplace
step registers 120 cpu "$PYTHON" bench/registers.py --arch "$arch"
step check 90 cpu "$PYTHON" -m bnkernels.check --quick
step tests 240 gpu "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider
sanitizer planted bash bench/planted.sh "$arch" "$LOGS" "${sanitizer_options[@]}"
sanitize memcheck
sanitize racecheck
sanitize synccheck
step bench 300 gpu "$PYTHON" -m bench --device cuda "${bench_options[@]}" --out "$LOGS/bench" --name "$BENCH"
step fused 60 gpu "$PYTHON" -m bench --device cuda --quick --epilogue add+relu --batch 256 --modes cold --directions forward,backward --no-plot --out "$LOGS/bench" --name "$BENCH-add-relu"
step tiny 60 gpu "$PYTHON" -m bench --device cuda --shapes tiny --batch 2 --modes user --no-plot --out "$LOGS/tiny" --name tiny
step ncu 120 gpu "$PYTHON" -m bench.ncu --out "$LOGS/ncu.md"

# At most 8 files: summary, logs, tiny, ncu, the bench's three, and the fused one's JSON (bench --render makes its report).
find "$LOGS" -path "$LOGS/bench/*" -type f ! -name '*-add-relu.md' -exec cp {} "$RESULTS/" \;
find "$LOGS" \( -path "$LOGS/tiny/*.md" -o -name ncu.md \) -type f -exec cp {} "$RESULTS/" \;
for log in "$LOGS"/*.log; do
  [[ -e $log ]] || continue
  printf '===== %s\n' "$(basename "$log" .log)"
  tr '\r' '\n' < "$log" | tail -n 60 | cut -c 1-400
done > "$RESULTS/logs.txt"
{
  echo "# What ran on $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader --id=0 2> /dev/null || echo 'no GPU')"
  echo
  echo "$(date -u +%FT%TZ), commit $(git rev-parse HEAD 2> /dev/null || echo unknown)$(git diff --quiet HEAD 2> /dev/null || echo ', with uncommitted changes'), $(nproc --all) cores, BENCH=$BENCH SANITIZE=$SANITIZE"
  echo
  echo "| step | status | s | last line |"
  echo "| ---- | ------ | -: | --------- |"
  printf '%s\n' "${rows[@]}"
} > "$RESULTS/summary.md"

echo
cat "$RESULTS/summary.md"
exit "$failed"
