"""LLM(...).generate and .stream: requests in, text out, and the loop between."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkernels.engine.audit import problems
from llmkernels.engine.beam import Beam, BeamParams, BeamSearch
from llmkernels.engine.cache import KVCache, page_bytes
from llmkernels.engine.forward import Forward
from llmkernels.engine.intake import Intake, Prompt
from llmkernels.engine.lora import Adapters
from llmkernels.engine.options import CACHE_DTYPES, as_list, build_speculator, default_params, read_draft
from llmkernels.engine.output import Delta, Feed, Output, best
from llmkernels.engine.pages import PagePool
from llmkernels.engine.params import SamplingParams
from llmkernels.engine.prefix import PrefixCache
from llmkernels.engine.runner import Runner, calibrate
from llmkernels.engine.sampling import Chosen
from llmkernels.engine.scheduler import Scheduler
from llmkernels.engine.speculative import Speculation
from llmkernels.models import shipped_model
from llmkernels.models.tokenizer import read_tokenizer
from llmkernels.models.weights import DTYPES, Checkpoint, device_of, load, one_of


class LLM:
    """A checkpoint, ready to answer.

    Args:
        model_path: a directory with config.json, *.safetensors and tokenizer.json; None is the shipped checkpoint.
        tokenizer: True reads tokenizer.json beside the weights; a path reads that file; False does without: token
            ids in, token ids out.
        dtype: 'float32', 'bfloat16', 'float16', or 'auto', what the checkpoint was saved in.
        device: 'cpu', 'cuda', 'cuda:1', ..., or 'auto', the first GPU if there is one.
        quantize: round the layers' projections to a scheme of llmkernels.quant at load, such as 'w4a16_g128'.
        quantize_head: the same for the projection to the vocabulary, which is more sensitive: 'w8a16'.
        kv_cache_dtype: 'auto' is the dtype of the model; 'int8', 'float8_e4m3fn' and 'float8_e5m2' halve or quarter the
            memory, with scales per layer and KV head from a calibration pass at load.
        kv_cache_bytes: memory for keys and values, in bytes; kv_cache_pages gives it in pages instead.
        page_size: tokens a page.
        max_batch_tokens: tokens a step at most: longer prompts are computed in chunks.
        max_sequences: requests that run at once at most, never more than max_batch_tokens; the others wait.
        max_length: tokens of a prompt and its answer at most; None is the checkpoint's context.
        prefix_reuse: keep the keys of what was read and written, and find them again where a prompt begins alike.
        speculation: guess tokens ahead, by a draft model, by n-grams, or both; the texts stay the same.
        graphs: record steps of few tokens and replay them: the same results with less work between the kernels.  A
            number: up to how many tokens, where one token each is no limit; True is 64 on a CPU and 256 on a GPU.
        compile: run the model through torch.compile; the first step of each kind waits for it, seconds to a minute.

    Raises:
        CheckpointError (a ValueError): the checkpoint cannot be used.  ValueError: an argument is wrong.
    """

    def __init__(
        self,
        model_path: str | Path | None = None,
        *,
        tokenizer: bool | str | Path = True,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        quantize_head: str | None = None,
        kv_cache_dtype: str = "auto",
        kv_cache_bytes: int = 2**30,
        kv_cache_pages: int | None = None,
        page_size: int = 16,
        max_batch_tokens: int = 512,
        max_sequences: int = 64,
        max_length: int | None = None,
        prefix_reuse: bool = True,
        speculation: Speculation | None = None,
        graphs: bool | int = True,
        compile: bool = False,
    ):
        sizes = {"page_size": page_size, "max_batch_tokens": max_batch_tokens, "max_sequences": max_sequences}
        optional = {"kv_cache_pages": kv_cache_pages, "max_length": max_length, "graphs": graphs or None}
        for name, size in (sizes | optional).items():
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} is {size!r}; give an integer of at least 1")
        checkpoint = Checkpoint(shipped_model() if model_path is None else model_path)
        self.config = checkpoint.config
        self.max_length = min(max_length or self.config.context, self.config.context)
        self.tokenizer = read_tokenizer(checkpoint.path, tokenizer)
        self.default_params = default_params(checkpoint.generation)

        kind = one_of("dtype", self.config.dtype if dtype == "auto" else dtype, DTYPES)
        cached = kind if kv_cache_dtype == "auto" else one_of("kv_cache_dtype", kv_cache_dtype, (kind, *CACHE_DTYPES))
        cache_dtype = (DTYPES | CACHE_DTYPES)[cached]
        place = device_of(device)
        draft = read_draft(speculation, self.config, self.max_length)
        one_page = page_bytes(self.config, page_size, cache_dtype)
        if draft:
            one_page += page_bytes(draft.config, page_size, DTYPES[draft.config.dtype])
        useful = max_sequences * -(-self.max_length // page_size)
        pages = kv_cache_pages or min(kv_cache_bytes // one_page, useful)
        if pages < 1:
            raise ValueError(f"kv_cache_bytes is {kv_cache_bytes}; a page of {page_size} tokens takes {one_page}")
        pool, guesses = PagePool(pages), speculation.guesses if speculation else 0
        prefix = PrefixCache(pool, page_size) if prefix_reuse else None
        together = min(max_sequences, max_batch_tokens)
        self._scheduler = Scheduler(pool, page_size, max_batch_tokens, together, prefix, guesses)

        length = min(self.max_length, pages * page_size)  # a longer sequence would never have the pages
        model = load(checkpoint, kind, place, length, quantize, quantize_head)
        cache = KVCache(self.config, pages, page_size, cache_dtype, place)
        if cached in CACHE_DTYPES:
            calibrate(model, cache)
        self._runner = Runner(model, cache, (max_sequences, length, graphs) if graphs else (), compile)
        self._runner.speculator = build_speculator(speculation, draft, self.max_length, self._runner.target)
        self._adapters = Adapters(model, self._scheduler)
        known = self.tokenizer, self.config.vocab, self.max_length, checkpoint.end_tokens
        self._intake = Intake(*known, self.default_params, self._adapters)
        self._searches: list[BeamSearch] = []

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        salt: str | None = None,
        adapter: str | None = None,
    ) -> list[Output]:
        """Answer one prompt or many, all together.  Returns params.n outputs for each prompt, in the prompts' order.

        Args:
            prompts: texts, or lists of token ids, or one of either.
            params: for all prompts, or one for each; None takes `default_params`: what generation_config.json says.
            salt: prefixes are shared with requests of the same salt only.
            adapter: the name of the adapter to answer with; see load_adapter.

        Raises:
            ValueError: a prompt is empty, too long, or holds an id that is no token; nothing has run then.
        """
        batch = as_list(prompts)
        each = params if isinstance(params, list) else [params] * len(batch)
        if len(each) != len(batch):
            raise ValueError(f"params has {len(each)} entries for {len(batch)} prompts; give one for all, or one each")
        requests = [self._intake.request(*asked, salt, adapter) for asked in zip(batch, each, strict=True)]
        outputs = [output for answers in requests for output in answers]
        try:
            for first, *_ in requests:
                self._scheduler.add(first._sequence)
            while any(output.finish_reason is None for output in outputs):
                self.step()
        finally:
            for output in outputs:  # only where something was raised is there anything left to abort
                self.abort(output)
        return [output for answers in requests for output in best(answers)]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        salt: str | None = None,
        adapter: str | None = None,
    ) -> Iterator[Delta]:
        """Answer one prompt, piece by piece:  for delta in llm.stream("Once"): print(delta.text, end="")

        A piece is whole characters; the last one of an output, maybe empty, comes with delta.output.finish_reason set.
        The params.answers outputs come interleaved.  Closing the iterator aborts the request.  What else was added
        advances with it.
        """
        return self._follow(self.add(prompt, params, salt=salt, adapter=adapter))

    def embed(self, prompts: Prompt | list[Prompt], *, adapter: str | None = None) -> list[list[float]]:
        """For each prompt the mean of its final hidden states, of length 1.  Errors as `generate`."""
        outputs = self.generate(prompts, SamplingParams(max_tokens=1, embed=True), adapter=adapter)
        return [output.embedding for output in outputs]

    def beam_search(
        self, prompt: Prompt, params: BeamParams | None = None, *, salt: str | None = None, adapter: str | None = None
    ) -> list[Beam]:
        """The likeliest answers to a prompt that beam search finds, params.width of them, the best first.

        Requests that were added run beside it.  ValueErrors as in `generate`, and where the beams find no room.
        """
        search = self.add_beams(prompt, params, salt=salt, adapter=adapter)
        try:
            while search.beams is None:
                self.step()
        finally:
            self.abort_beams(search)
        return search.beams

    def add_beams(
        self, prompt: Prompt, params: BeamParams | None = None, *, salt: str | None = None, adapter: str | None = None
    ) -> BeamSearch:
        """Queue a beam search without running it; steps bring it further, until its `beams` are there."""
        params = params or BeamParams()
        stop, count = self._intake.stop, params.width + len(self._intake.stop)
        wishes = SamplingParams(max_tokens=params.max_tokens, top_logprobs=count, ignore_eos=True)
        outputs = self._intake.request(prompt, wishes, salt, adapter)
        search = BeamSearch(params, outputs[0], self._scheduler, stop, self._intake.decode)
        self._scheduler.add(outputs[0]._sequence)
        self._searches.append(search)
        return search

    def abort_beams(self, search: BeamSearch) -> None:
        """End a beam search now; nothing happens to one that has ended."""
        search.abort()
        if search in self._searches:
            self._searches.remove(search)

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        salt: str | None = None,
        adapter: str | None = None,
    ) -> list[Output]:
        """Queue a request without running it; each `step` brings its params.answers Outputs further.

        The prompt is computed once; its answers share its pages.  Where params.best_of asks for a choice, `best` makes
        it when they have finished.  ValueErrors as in `generate`.
        """
        outputs = self._intake.request(prompt, params, salt, adapter)
        self._scheduler.add(outputs[0]._sequence)
        return outputs

    def step(self) -> bool:
        """One forward pass for every request that has its turn; False when there was nothing to do."""
        self._adapters.sweep()
        chunks = self._scheduler.schedule()
        if not chunks:
            return False
        try:
            choices = self._runner.run(chunks)
        except BaseException:  # Ctrl-C as well: others may go on
            self._scheduler.take_back(chunks)
            raise
        ends: list[Output] = [chunk.sequence.payload for chunk in chunks if chunk.samples]
        for output in ends:
            if output.guide and output.guide.failed:
                self._scheduler.end(output._sequence, "error")
        gained = self._scheduler.advance(chunks, [taken[-1].token for taken in choices])
        for output, taken, count in zip(ends, choices, gained, strict=True):
            reason = output.finish_reason
            for number, chosen in enumerate(taken[:count], 1):
                if self._take(output, chosen, reason if number == count else None):
                    break
            for token in output._forced():
                self._scheduler.extend(output._sequence, token)
                if self._take(output, Chosen(token), output.finish_reason) or output.finish_reason:
                    break
        self._searches = [search for search in self._searches if search.advance()]
        return True

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Read a LoRA adapter in PEFT's format from the directory `path`; requests name it by `name`.

        Raises:
            CheckpointError (a ValueError): it cannot be used, or is not for this model.  ValueError: the name is taken.
        """
        self._adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter; those that were asked for finish first.  ValueError: it is not loaded."""
        self._adapters.unload(name)

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that can be asked for."""
        return self._adapters.names

    def prepare(self, params: SamplingParams | None) -> Any:
        """Compile what such a request needs, maybe for seconds, on any thread; while it lives, `add` is quick."""
        return self._intake.grammar(params)

    def abort(self, output: Output) -> None:
        """End a request now and free its pages; nothing happens to a finished one."""
        self._scheduler.end(output._sequence)

    def stats(self) -> dict[str, int]:
        """Requests that run and wait; pages used, idle (their keys are kept) and empty; preemptions, reuse; tokens
        guessed, and those that came true; decode steps that were replayed, and that were not."""
        scheduler, graphs, speculator = self._scheduler, self._runner.target.graphs, self._runner.speculator
        return scheduler.stats() | {
            "guessed_tokens": speculator.guessed if speculator else 0,
            "accepted_tokens": speculator.accepted if speculator else 0,
            "decode_replayed_steps": graphs.replayed if graphs else 0,
            "decode_plain_steps": graphs.plain if graphs else 0,
        }

    @property
    def forwards(self) -> list[Forward]:
        """What a step runs, for whoever measures it: the model, and the draft model where there is one."""
        draft = self._runner.speculator and self._runner.speculator.draft
        return [self._runner.target, *([draft] if draft else [])]

    def check(self) -> None:
        """RuntimeError unless every page is free, kept for its keys, or used by the sequences that it counts."""
        if found := list(problems(self._scheduler)):
            raise RuntimeError(f"the cache's pages do not add up: {'; '.join(found)}")

    @property
    def scheduler(self) -> Scheduler:
        """Requests, pages and prefixes, for whoever draws them between two steps; nothing of it is to be changed."""
        return self._scheduler

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens that the tokenizer puts around a prompt."""
        return self._intake.encode(text)

    def _take(self, output: Output, chosen: Chosen, reason: str | None) -> bool:
        """Hand a token on, the last one if there is a reason; True where the text ends otherwise, by a stop string or
        because its grammar cannot go on."""
        ended = ""
        if output.guide and not output.guide.accept(chosen.token):
            ended = "error"
        elif output._receive(chosen, reason):
            ended = "stop"
        if ended:
            self._scheduler.end(output._sequence)
            output._sequence.finish_reason = ended  # also where the same token was the last one allowed
        return bool(ended)

    def _follow(self, outputs: list[Output]) -> Iterator[Delta]:
        feed = Feed(outputs)
        try:
            while feed:
                news = False  # maybe by another stream's steps
                for delta in feed.news():
                    news = True
                    yield delta
                if not news:
                    self.step()
        finally:
            for output in outputs:
                self.abort(output)
