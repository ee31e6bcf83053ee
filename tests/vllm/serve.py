"""One vLLM engine: serve.py WISHES OUT, JSON in, JSON out.  In a process of its own, as plug-ins are loaded once."""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    wishes = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    llm = LLM(
        skip_tokenizer_init=True,
        worker_extension_cls="steps.Steps",
        enable_prefix_caching=True,
        disable_log_stats=False,
        seed=0,
        **wishes["engine"],
    )
    params = SamplingParams(max_tokens=wishes["new"], temperature=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in wishes["prompts"]]

    def generate():
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        first = max(o.metrics.first_token_ts for o in outputs)
        last = max(o.metrics.last_token_ts for o in outputs)
        return outputs, seconds - (last - first), last - first

    repeats = wishes.get("repeats", 0)
    if repeats:
        generate()  # warms up
        llm.reset_prefix_cache()
    (layers,) = llm.collective_rpc("watch")
    prefill, decode = [], []
    for _ in range(repeats or 1):
        outputs, *seconds = generate()
        prefill.append(seconds[0])
        decode.append(seconds[1])
        llm.reset_prefix_cache()
    (seen,) = llm.collective_rpc("seen")
    found = {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "cached": [o.num_cached_tokens for o in outputs],
        "layers": layers,
        "steps": seen["tokens"],
        "ledger": seen["ledger"],
        "threads": seen["threads"],
        "prefill_seconds": prefill,
        "decode_seconds": decode,
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
