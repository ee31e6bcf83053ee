#!/usr/bin/env bash
# The peers of the GPU benchmarks, for a machine that can install nothing: packages in a folder, FlashInfer's kernels built.
#
#     bench/gpu_peers.sh DIR [MODULE ...]      MODULE: silu decode prefill norm, FlashInfer's; all by default
#     PEERS=DIR bench/record_triton.sh OUT     there
#
# The packages are for PYTHON_VERSION=3.12 and come without what they need beside torch: einops, ninja, nvidia-ml-py,
# tabulate, tqdm, cuda-bindings.  The kernels are for ARCH=9.0a and are built by nvcc, minutes each, with a Python that has
# torch and those packages, and nvcc in CUDA_HOME; prefill wants the headers of cuRAND and norm those of cuBLAS, in INCLUDE
# where CUDA_HOME has none.
# They go where FlashInfer looks for kernels that are built, and most of their sources go, 80 MB.  `none` builds none and keeps
# them, so that FlashInfer builds there, if nvcc is there.
set -euo pipefail
folder=${1:?usage: bench/gpu_peers.sh DIR [MODULE ...]}
shift
python=${PYTHON:-python3}
mkdir -p "$folder/wheels"
folder=$(cd "$folder" && pwd)
version=${PYTHON_VERSION:-3.12}
platforms=()
for glibc in 2_17 2_24 2_28; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" "${platforms[@]}" \
    --dest "$folder/wheels" flashinfer-python==0.6.18.post1 'apache-tvm-ffi<0.2' liger-kernel
"$python" -m pip wheel -q --no-deps --wheel-dir "$folder/wheels" gemlite
"$python" - "$folder" <<'PYTHON'
import sys, zipfile
from pathlib import Path
folder = Path(sys.argv[1])
for wheel in (folder / "wheels").glob("*.whl"):
    zipfile.ZipFile(wheel).extractall(folder / "site")
    print(wheel.name)
PYTHON
cc -shared -o "$folder/libcuda.so" -x c /dev/null  # to link against; the driver's own is loaded there
CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} FLASHINFER_WORKSPACE_BASE=$folder FLASHINFER_CUDA_ARCH_LIST=${ARCH:-9.0a} FLASHINFER_EXTRA_LDFLAGS=-L$folder \
    FLASHINFER_EXTRA_CUDAFLAGS=${INCLUDE:+-isystem $INCLUDE} MAX_JOBS=${JOBS:-2} "$python" - "$folder/site" "${@:-all}" <<'PYTHON'
import re, shutil, sys, time
from pathlib import Path
sys.path.append(sys.argv[1])  # behind the packages of this Python, whose version may be another
import torch
from flashinfer.jit import activation, norm
from flashinfer.jit.attention import modules
kind = (torch.bfloat16,) * 3 + (torch.int32, 128, 128, 0, False, False)  # q, keys, out, indices; head sizes; no option
known = {
    "silu": lambda: activation.gen_act_and_mul_module("silu"),
    "decode": lambda: modules.gen_batch_prefill_module("fa2", *kind, False),  # which its decode with matrix units is
    "prefill": lambda: modules.gen_batch_prefill_module("fa3", *kind, False),
    "norm": norm.gen_norm_module,
}
wanted = known if sys.argv[2:] == ["all"] else [name for name in sys.argv[2:] if name != "none"]
for name in wanted:
    since, module = time.time(), known[name]()
    module.build(verbose=False)
    place = Path(sys.argv[1], "flashinfer", "data", "aot", module.name)
    place.mkdir(parents=True, exist_ok=True)
    if module.get_library_path() != place / f"{module.name}.so":  # there from a run before
        shutil.copy(module.get_library_path(), place)
    print(f"{name}: {module.name}, {time.time() - since:.0f} s", flush=True)
if wanted:  # FlashInfer reads its templates and copies kernels' own files all the same
    for source in Path(sys.argv[1], "flashinfer", "data").rglob("*"):
        kept = "aot" in source.parts or re.search(r"jinja|prefill|decode|norm|activation", source.name)
        if source.is_file() and not kept:
            source.unlink()
PYTHON
rm -r "$folder/wheels"
