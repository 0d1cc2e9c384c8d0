#!/usr/bin/env bash
# Checks whether this machine's NPU is sound with this project. It builds, compares every kernel with plain torch, tries
# collectives, trains ten steps against the golden losses, times the loss, and writes one report to send back.
#
#   bash tools/npu_selftest.sh [REPORT]          DEVICE=npu | cuda | cpu; BUILD=no takes the kernels that are installed
#
# Exit code 0: nothing is wrong (what was skipped says why); 1: something is.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
DEVICE=${DEVICE:-npu}
REPORT=${1:-npu_selftest.txt}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
VERDICTS=()

say() { printf '%s\n' "$@" | tee -a "$REPORT"; }

# step NAME COMMAND...: the command's output goes into the report, its exit code (3: skipped) into the verdict
step() {
    local name=$1 code
    shift
    say "" "== $name: $*"
    "$@" 2>&1 | tee -a "$REPORT"
    code=${PIPESTATUS[0]}
    case $code in
        0) VERDICTS+=("$name: right") ;;
        3) VERDICTS+=("$name: skipped, see above") ;;
        *) VERDICTS+=("$name: WRONG (exit code $code)") ;;
    esac
}

skip() {
    say "" "== $1: skipped: $2"
    VERDICTS+=("$1: skipped: $2")
}

: > "$REPORT" || exit 2
say "megatron_replay self-test, DEVICE=$DEVICE, $(date -u +%Y-%m-%dT%H:%MZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(uname -sm)"
if [ "$DEVICE" = npu ]; then
    step driver npu-smi info
else
    skip driver "npu-smi needs an NPU (DEVICE=$DEVICE)"
fi
if [ "${BUILD:-yes}" = no ]; then
    skip build "BUILD=no: the kernels that are installed are used"
else
    step build env "MEGATRON_REPLAY_BUILD=$DEVICE" python setup.py build_ext --inplace
fi
step doctor python -m megatron_replay doctor "device=$DEVICE"
for part in kernels collectives golden timings; do
    step "$part" python tools/selftest.py --device "$DEVICE" "$part"
done

say "" "== verdict" "${VERDICTS[@]}"
[[ ${VERDICTS[*]} != *WRONG* ]]
