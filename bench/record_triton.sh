#!/usr/bin/env bash
# Everything worth recording about the Triton kernels on a GPU, from a source tree that need not be installed:
#
#     bench/record_triton.sh OUT [STEP ...]      STEP: conformance graphs before tune after; all of them by default
#
#     conformance   every case of every contract              OUT/evidence.json, OUT/conformance.txt
#     graphs        CUDA graphs, torch.compile                OUT/graphs.txt
#     before        benchmarks with the heuristics and peers  OUT/bench-heuristics.json, .txt
#     tune          tiles measured on this GPU                OUT/tuned.json, OUT/tune.txt
#     after         benchmarks with those tiles and peers     OUT/bench.json, OUT/roofline.png
#
# Copy evidence.json to llmkernels/evidence/<device>-triton.json, tuned.json to backends/triton/tuned/<device>.json and
# bench.json to bench/results/<device>.json.  OPS="paged_attention rms_norm" limits before, tune and after; after
# MINUTES=9, for each op named or in all, tune begins with no further kind of call.  A step that fails does not keep the
# next ones from running; the exit code tells.
set -uo pipefail
out=${1:?usage: bench/record_triton.sh OUT [STEP ...]}
shift
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export LLMKERNELS_CACHE=${LLMKERNELS_CACHE:-$out/cache}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
mkdir -p "$out" && mkdir -p -m 700 "$LLMKERNELS_CACHE"
echo "{}" > "$out/no-table.json"
failed=0
step() {
    name=$1 && shift
    echo "== $name: $*"
    "$@" 2>&1 | tee -a "$out/$name.txt" || failed=1
}
"$python" -m llmkernels doctor --json > "$out/doctor.json" || failed=1
for what in ${@:-conformance graphs before tune after}; do
    case $what in
        conformance)
            step conformance "$python" -m llmkernels conformance --backend triton --device "$device" \
                --record "$out/evidence.json" ;;
        graphs) step graphs "$python" "$here/tests/triton_gpu.py" ;;
        before | after)
            table=$out/no-table.json file=$out/bench-heuristics.json
            if [ "$what" = after ]; then table=$out/tuned.json file=$out/bench.json; fi
            for op in ${OPS:-all}; do
                only=() part=$file
                if [ "$op" != all ]; then only=(--op "$op") part=${file%.json}-$op.json; fi
                LLMKERNELS_TUNED=$table step "$what" "$python" -m llmkernels bench --peers --device "$device" \
                    "${only[@]}" --json "$part" --plot "${part%.json}.png"
            done ;;
        tune)
            for op in ${OPS:-all}; do
                only=()
                if [ "$op" != all ]; then only=(--op "$op"); fi
                step tune "$python" -m llmkernels tune --device "$device" --minutes "${MINUTES:-9}" "${only[@]}" --table "$out/tuned.json"
            done ;;
        *) echo "no step $what; the steps are conformance graphs before tune after" && failed=1 ;;
    esac
done
exit $failed
