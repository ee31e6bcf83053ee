#!/usr/bin/env bash
# Everything worth recording about one device, in one call, from a source tree that need not be installed:
#
#     bench/record.sh cuda OUT        conformance of every backend into OUT/evidence.json, benchmarks into OUT/bench.json
#
# Copy evidence.json to llmkernels/evidence/<device>.json and bench.json to bench/results/<device>.json.
set -uo pipefail
device=${1:?usage: bench/record.sh cpu|cuda OUT [BACKEND ...]}
out=${2:?usage: bench/record.sh cpu|cuda OUT [BACKEND ...]}
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0
for backend in "${@:-reference vendor}"; do
    for name in $backend; do
        echo "== conformance $name on $device"
        "$python" -m llmkernels conformance --backend "$name" --device "$device" --record "$out/evidence.json" || failed=1
    done
done
echo "== dispatch"
"$python" -m llmkernels bench --dispatch --device "$device" || failed=1
echo "== bench"
"$python" -m llmkernels bench --peers --device "$device" --json "$out/bench.json" --plot "$out/roofline.png" || failed=1
exit $failed
