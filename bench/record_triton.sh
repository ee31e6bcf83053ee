#!/usr/bin/env bash
# Everything worth recording about the Triton kernels on a GPU, from a source tree that need not be installed:
#
#     bench/record_triton.sh OUT [STEP ...]      STEP: one of those below; all by default, in this order
#
#     graphs        CUDA graphs, torch.compile                OUT/graphs.txt
#     conformance   every case of every contract              OUT/evidence.json, OUT/conformance.txt
#     before        benchmarks with the heuristics and peers  OUT/bench-heuristics.json, .png, OUT/before.txt
#     engine        tokens a second; graphs, torch.compile    OUT/engine.json, OUT/engine.txt
#     tune          tiles measured on this GPU                OUT/tuned.json, OUT/tune.txt
#     after         benchmarks with those tiles and peers     OUT/bench.json, .png, OUT/after.txt
#     records       this tree's records, and what is new      OUT/records/evidence.json, bench.json, engine.json
#
# Copy records/evidence.json to llmkernels/evidence/<device>.json, records/bench.json to bench/results/<device>.json,
# records/engine.json to bench/results/<device>-engine.json and tuned.json to backends/triton/tuned/<device>.json.
# records needs no GPU.  records/bench.json holds the times of `before`, which is what the library does without a table;
# RECORD=bench those of `after`.
#
# OPS="paged_attention rms_norm" limits conformance, benchmarks and tune, CASE="decode" the benchmarks to calls whose
# names contain that.  JOBS processes examine kernels at once, as many as there are cores: they wait for compilers.
# After MINUTES=9, for each op named or in all, tune begins with no further kind of call.  PATIENCE=300 ends a command
# that takes as many seconds.  PEERS is a folder that bench/gpu_peers.sh made, where FlashInfer, gemlite and Liger are not
# installed.  A step that fails does not keep the next ones from running; the exit code tells.
set -uo pipefail
out=${1:?usage: bench/record_triton.sh OUT [STEP ...]}
shift
steps="graphs conformance before engine tune after records"
for what in "$@"; do
    case " $steps " in *" $what "*) ;; *) echo "no step $what; the steps are $steps" >&2 && exit 2 ;; esac
done
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ -n "${PEERS:-}" ]; then
    export PYTHONPATH=$PYTHONPATH:$PEERS/site FLASHINFER_WORKSPACE_BASE=$PEERS
fi
export LLMKERNELS_CACHE=${LLMKERNELS_CACHE:-$out/cache}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
mkdir -p "$out" && mkdir -p -m 700 "$LLMKERNELS_CACHE"
echo "{}" > "$out/no-table.json"
failed=0
step() {
    name=$1 && shift
    echo "== $name: $*"
    timeout "${PATIENCE:-0}" "$@" 2>&1 | tee -a "$out/$name.txt" || failed=1
}
records() {
    "$python" - "$out" "${RECORD:-bench-heuristics}" <<'PYTHON'
import json
import sys
from pathlib import Path
from llmkernels import status
from llmkernels.bench import results
out, times = Path(sys.argv[1]), sys.argv[2]
if (out / "evidence.json").exists():
    fresh = status.read(out / "evidence.json")
    known = [record for record in status.records() if record["device"] == fresh[0]["device"]]
    status.write(out / "records" / "evidence.json", [*known, *fresh])
for file in [*out.glob(f"{times}.json"), *out.glob(f"{times}-*.json")]:
    new, kept = results.read(file), out / "records" / "bench.json"
    old = kept if kept.exists() else results.place(new["device"])
    results.write(kept, results.merge(results.read(old), new) if old and old.exists() else new)
if (out / "engine.json").exists():
    new = json.loads((out / "engine.json").read_text())
    place = results.place(new["device"])
    old = place.with_name(f"{place.stem}-engine.json") if place else None
    kind = lambda row: [row.get(name) for name in ("model", "dtype", "quantize", "sequences", "graphs", "compile", "backend")]
    kinds = [kind(row) for row in new["rows"]]
    if old and old.exists():
        new["rows"] += [row for row in json.loads(old.read_text())["rows"] if kind(row) not in kinds]
    (out / "records").mkdir(exist_ok=True)
    (out / "records" / "engine.json").write_text(json.dumps(new, indent=1) + "\n")
print(*sorted((out / "records").glob("*")), sep="\n")
PYTHON
}
"$python" -m llmkernels doctor --json > "$out/doctor.json" || failed=1
for what in ${@:-$steps}; do
    case $what in
        conformance)
            for op in ${OPS:-all}; do
                only=()
                if [ "$op" != all ]; then only=(--op "$op"); fi
                step conformance "$python" -m llmkernels conformance --backend triton --device "$device" "${only[@]}" \
                    --jobs "${JOBS:-$(nproc)}" --record "$out/evidence.json"
            done ;;
        records) records 2>&1 | tee "$out/records.txt" || failed=1 ;;
        graphs) step graphs "$python" "$here/tests/triton_gpu.py" --jobs "${JOBS:-$(nproc)}" ;;
        engine) step engine "$python" "$here/bench/engine_gpu.py" --json "$out/engine.json" ;;
        before | after)
            table=$out/no-table.json file=$out/bench-heuristics.json
            if [ "$what" = after ]; then table=$out/tuned.json file=$out/bench.json; fi
            for op in ${OPS:-all}; do
                only=() part=$file
                if [ "$op" != all ]; then only=(--op "$op") part=${file%.json}-$op.json; fi
                LLMKERNELS_TUNED=$table step "$what" "$python" -m llmkernels bench --backend triton --peers --device "$device" \
                    "${only[@]}" --case "${CASE:-}" --json "$part" --plot "${part%.json}.png"
            done ;;
        tune)
            for op in ${OPS:-all}; do
                only=()
                if [ "$op" != all ]; then only=(--op "$op"); fi
                step tune "$python" -m llmkernels tune --device "$device" --minutes "${MINUTES:-9}" "${only[@]}" --table "$out/tuned.json"
            done ;;
    esac
done
exit $failed
