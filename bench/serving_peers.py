"""One engine under the load of bench/serving.py, without HTTP, in a process of its own:

    python bench/serving_peers.py ENGINE < work.json

work.json: {checkpoint, gguf, kind, threads, rates: [{concurrency, requests: [[prompt, max_tokens]]}]}.  For each rate
a line of JSON comes out: how the load went, and the tokens of every answer, for whoever compares them.

Every engine gets the same loop around it: `concurrency` requests at once, the next when one is answered, greedy, no
stop token.  None pays for HTTP or text, so that what our server loses to them is in the open.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from llmkernels.bench.load import Timing, summary

CHUNK = 512  # tokens a step at most, for all of them


class Ours:
    """llmkernels.engine, as the server runs it."""

    def __init__(self, work: dict[str, Any]):
        from llmkernels.engine import LLM

        self.llm = LLM(
            work["checkpoint"],
            tokenizer=False,
            device="cpu",
            max_batch_tokens=CHUNK,
            max_length=work["context"],
            **work["ours"],
        )
        self.outputs: dict[int, Any] = {}
        self.told: dict[int, int] = {}

    def add(self, number: int, prompt: list[int], count: int) -> None:
        from llmkernels.engine import SamplingParams

        self.outputs[number] = self.llm.add(prompt, SamplingParams(max_tokens=count, ignore_eos=True))[0]
        self.told[number] = 0

    def step(self) -> Iterator[tuple[int, list[int], bool]]:
        self.llm.step()
        for number, output in [*self.outputs.items()]:
            new, done = output.tokens[self.told[number] :], output.finish_reason is not None
            self.told[number] += len(new)
            if done:
                del self.outputs[number]
            if new or done:
                yield number, new, done


class LlamaCpp:
    """llama.cpp's C functions with the loop of its own server: one token of each sequence that decodes, then prompts.

    Its Python server answers one request at a time, and would be no peer.
    """

    def __init__(self, work: dict[str, Any]):
        import llama_cpp
        import llama_cpp_peer  # noqa: F401  silences it

        self.c, most = llama_cpp, max(rate["concurrency"] for rate in work["rates"])
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(work["gguf"].encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = most * work["context"], most
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = work["threads"]
        params.kv_unified = False  # faster here at every number of sequences
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
        self.free = list(range(most))[::-1]
        self.live: dict[int, dict[str, Any]] = {}

    def add(self, number: int, prompt: list[int], count: int) -> None:
        self.live[number] = {"pending": prompt, "at": 0, "left": count, "seat": self.free.pop()}

    def step(self) -> Iterator[tuple[int, list[int], bool]]:
        rows: list[tuple[int, int, int, bool]] = []  # token, position, sequence, whether its logits are wanted
        ends: list[tuple[int, int]] = []
        for number, one in sorted(self.live.items(), key=lambda item: len(item[1]["pending"])):
            part = one["pending"][: CHUNK - len(rows)]
            last = len(part) == len(one["pending"])
            rows += [(token, one["at"] + i, one["seat"], last and i == len(part) - 1) for i, token in enumerate(part)]
            one["at"] += len(part)
            one["pending"] = one["pending"][len(part) :]
            if last and part:
                ends.append((number, len(rows) - 1))
        batch = self.batch
        batch.n_tokens = len(rows)
        tokens, positions, seats, wanted = zip(*rows, strict=True)
        np.ctypeslib.as_array(batch.token, (CHUNK,))[: len(rows)] = tokens
        np.ctypeslib.as_array(batch.pos, (CHUNK,))[: len(rows)] = positions
        np.ctypeslib.as_array(batch.n_seq_id, (CHUNK,))[: len(rows)] = 1
        np.ctypeslib.as_array(batch.logits, (CHUNK,))[: len(rows)] = wanted
        for i, seat in enumerate(seats):
            batch.seq_id[i][0] = seat
        if status := self.c.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        for number, row in ends:
            one = self.live[number]
            logits = self.c.llama_get_logits_ith(self.context, row)
            token = int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())
            one["pending"], one["left"] = [token], one["left"] - 1
            if not one["left"]:
                self.c.llama_memory_seq_rm(self.memory, one["seat"], -1, -1)
                self.free.append(one["seat"])
                del self.live[number]
            yield number, [token], not one["left"]


class Transformers:
    """transformers' continuous batching: generate_batch's manager, to which requests are added as others end."""

    def __init__(self, work: dict[str, Any]):
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        torch.set_num_threads(work["threads"])
        model = AutoModelForCausalLM.from_pretrained(work["checkpoint"], dtype=getattr(torch, work["kind"]))
        most = max(rate["concurrency"] for rate in work["rates"])
        wish = GenerationConfig(max_new_tokens=work["context"], do_sample=False, pad_token_id=0, eos_token_id=-1)
        sizes = {"num_blocks": most * -(-work["context"] // 32) + 8, "page_size": 32, "max_batch_tokens": CHUNK}
        self.manager = model.eval().init_continuous_batching(
            generation_config=wish, continuous_batching_config=ContinuousBatchingConfig(**sizes)
        )
        self.manager.start()
        self.told: dict[str, int] = {}

    def add(self, number: int, prompt: list[int], count: int) -> None:
        self.told[str(number)] = 0
        self.manager.add_request(prompt, request_id=str(number), max_new_tokens=count, streaming=True)

    def step(self) -> Iterator[tuple[int, list[int], bool]]:
        result = self.manager.get_result(timeout=60)
        if result is None or result.error:
            raise RuntimeError(f"transformers gave no token: {result and result.error}")
        new = result.generated_tokens[self.told[result.request_id] :]
        self.told[result.request_id] += len(new)
        yield int(result.request_id), new, result.is_finished()

    def close(self) -> None:
        self.manager.stop(block=True, timeout=10)


ENGINES = {"llmkernels": Ours, "llama.cpp": LlamaCpp, "transformers": Transformers}


def drive(engine: Any, requests: list[tuple[list[int], int]], concurrency: int) -> tuple[list[Timing], list[list[int]]]:
    """The closed loop of llmkernels.bench.load.drive, around an engine that is stepped; timings and answers."""
    timings: dict[int, Timing] = {}
    answers: list[list[int]] = [[] for _ in requests]
    waiting = list(enumerate(requests))[::-1]
    running = 0
    while waiting or running:
        while waiting and running < concurrency:
            number, (prompt, count) = waiting.pop()
            timings[number] = Timing(time.perf_counter(), prompt_tokens=len(prompt))
            engine.add(number, prompt, count)
            running += 1
        for number, new, done in engine.step():
            now, timing = time.perf_counter(), timings[number]
            timing.pieces += [now] * bool(new)
            timing.tokens += len(new)
            timing.end = now
            answers[number] += new
            running -= done
    return [timings[number] for number in sorted(timings)], answers


def main() -> None:
    work = json.load(sys.stdin)
    torch.set_num_threads(work["threads"])
    engine = ENGINES[sys.argv[1]](work)
    drive(engine, work["rates"][0]["requests"][:2], 1)  # what is done once is not timed
    for rate in work["rates"]:
        timings, answers = drive(engine, rate["requests"], rate["concurrency"])
        told = {"concurrency": rate["concurrency"], **summary(timings), "answers": answers}
        print(json.dumps(told), flush=True)
    if hasattr(engine, "close"):
        engine.close()


if __name__ == "__main__":
    main()
