#!/usr/bin/env bash
# Everything worth recording about one device, in one call, from a source tree that need not be installed:
#
#     bench/record.sh cpu OUT         conformance of every backend, on each instruction set of this processor, into
#     bench/record.sh cuda OUT        OUT/evidence.json; benchmarks into OUT/bench.json, their picture OUT/roofline.png;
#                                     on a CPU the engine beside llama.cpp into OUT/engine.json, if it is installed
#     bench/record.sh cpu OUT cpu     ... of this backend only, with the others as its peers
#
# Copy evidence.json to llmkernels/evidence/<device>.json, bench.json to bench/results/<device>.json, engine.json to
# bench/results/<device>-engine.json, and run make readme.
set -uo pipefail
usage="usage: bench/record.sh cpu|cuda OUT [BACKEND ...]"
device=${1:?$usage}
out=${2:?$usage}
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
test $# -gt 0 || set -- reference vendor $(test "$device" = cpu && echo cpu)
mkdir -p "$out"
failed=0

conformance() {
    echo "== conformance $1 on $device ${LLMKERNELS_CPU_ISA:-}"
    "$python" -m llmkernels conformance --backend "$1" --device "$device" --record "$out/evidence.json" || failed=1
}

for backend in "$@"; do
    test "$backend" = cpu || { conformance "$backend"; continue; }
    for isa in avx512 avx2 portable; do
        export LLMKERNELS_CPU_ISA=$isa
        if test $isa = portable || "$python" -c 'from llmkernels.backends import cpu; cpu.isa()' 2>/dev/null; then
            conformance cpu
        fi
    done
    unset LLMKERNELS_CPU_ISA
done
echo "== dispatch"
"$python" -m llmkernels bench --dispatch --device "$device" || failed=1
echo "== bench"
only=$(test $# = 1 && echo "--backend $1")
"$python" -m llmkernels bench --peers --device "$device" $only --json "$out/bench.json" --plot "$out/roofline.png" ||
    failed=1
if test "$device" = cpu && "$python" -c 'import llama_cpp, gguf' 2>/dev/null; then
    echo "== engine"
    "$python" "$here/bench/engine.py" --prepare && "$python" "$here/bench/engine.py" --json "$out/engine.json" || failed=1
fi
exit $failed
