"""One vLLM engine: serve.py WISHES OUT, JSON in, JSON out.  In a process of its own, as plug-ins are loaded once."""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    wishes = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    engine = wishes["engine"]
    llm = LLM(
        skip_tokenizer_init=True,
        worker_extension_cls="steps.Steps",
        enable_prefix_caching=True,
        disable_log_stats=False,
        seed=0,
        **engine,
    )
    params = SamplingParams(max_tokens=wishes["new"], temperature=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in wishes["prompts"]]
    if wishes.get("warm"):
        llm.generate(prompts, params, use_tqdm=False)
        llm.reset_prefix_cache()
    (layers,) = llm.collective_rpc("watch")
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    (seen,) = llm.collective_rpc("seen")
    found = {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "cached": [o.num_cached_tokens for o in outputs],
        "layers": layers,
        "steps": seen["tokens"],
        "ledger": seen["ledger"],
        "seconds": seconds,
        "decode": [decode_seconds(o.metrics) for o in outputs],
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


def decode_seconds(metrics) -> float | None:
    """From a request's first token to its last."""
    return None if metrics is None else metrics.last_token_ts - metrics.first_token_ts


if __name__ == "__main__":
    main()
