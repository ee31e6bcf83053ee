"""What Prometheus reads of a server: queues, pages, prefix hits, tokens, times, and which backend answered which op."""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from llmkernels.server.remote import Delta

FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)  # seconds
RECENT = 10  # seconds
GAUGES = {
    "running": "Requests that run.",
    "waiting": "Requests that wait.",
    "generated_tokens_per_second": "Tokens generated a second, over the last ten seconds.",
    "prefix_hit_rate": "Share of the prompts' tokens whose keys were there, since the start.",
    "pages_used": "Pages of the cache that requests use.",
    "pages_idle": "Pages that nobody uses and whose keys are kept.",
    "pages_empty": "Pages without keys.",
}
COUNTERS = {
    "preemptions": "Requests that lost their pages to older ones.",
    "prefix_asked_tokens": "Tokens of prompts that were looked up in the prefix cache.",
    "prefix_found_tokens": "Those of them whose keys were there.",
    "guessed_tokens": "Tokens that were guessed ahead of the model.",
    "accepted_tokens": "Those of them that came true.",
    "decode_replayed_steps": "Decode steps that were recorded before and replayed.",
    "decode_plain_steps": "Decode steps that were not.",
}


class Metrics:
    """Counts what an engine does; `registry` is for prometheus_client.

    counters: what the engine itself counts, host.QUESTIONS["counters"], to be set before the registry is read.
    """

    def __init__(self) -> None:
        self.counters: dict[str, Any] = {}
        self.registry = CollectorRegistry()
        here: Any = {"namespace": "llmkernels", "registry": self.registry}
        self._tokens = Counter("generated_tokens", "Tokens generated.", **here)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts, of requests that were answered.", **here)
        self._finished = Counter("answers", "Answers finished.", ["reason"], **here)
        self._first = Histogram(
            "first_token_seconds", "From a request's arrival to its first text.", buckets=FAST, **here
        )
        self._next = Histogram("next_token_seconds", "Between two tokens of an answer.", buckets=FAST, **here)
        self._sums = {"generated": 0, "first_count": 0, "first_seconds": 0.0, "next_count": 0, "next_seconds": 0.0}
        self._recent: deque[tuple[int, int]] = deque()  # (second, tokens generated in it), no older than RECENT
        self.registry.register(_Engine(self))

    def totals(self) -> dict[str, float]:
        """generated: tokens so far; {first,next}_{count,seconds}: how many times were measured, and their sum."""
        return dict(self._sums)

    def rate(self) -> float:
        """Tokens generated a second, over the last RECENT seconds."""
        now = int(time.monotonic())
        return sum(count for second, count in self._recent if now - RECENT <= second < now) / RECENT

    def observe(self, deltas: list[Delta]) -> None:
        """Called with what each step brought."""
        now, sums, generated = time.monotonic(), self._sums, 0
        for delta in deltas:
            answer, count = delta.answer, len(delta.tokens)
            if answer.params.embed:  # it writes nothing
                self._prompt.inc(answer.prompt)
                self._finished.labels("embedding").inc()
                continue
            generated += count
            if answer.last is None:
                passed = now - answer.arrived
                sums["first_count"] += 1
                sums["first_seconds"] += passed
                self._first.observe(passed)
                self._prompt.inc(0 if answer.index else answer.prompt)
            elif count:
                passed = now - answer.last
                sums["next_count"] += count
                sums["next_seconds"] += passed
                for _ in range(count):
                    self._next.observe(passed / count)
            answer.last = now
            if delta.finish_reason:
                self._finished.labels(delta.finish_reason).inc()
        sums["generated"] += generated
        second, count = self._recent.pop() if self._recent and self._recent[-1][0] == int(now) else (int(now), 0)
        self._recent.append((second, count + generated))
        while self._recent[0][0] < int(now) - RECENT:
            self._recent.popleft()
        self._tokens.inc(generated)


class _Engine(Collector):
    """What the engine itself counts."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        if not self._metrics.counters:  # as it is when this is registered
            return
        stats = {**self._metrics.counters, "generated_tokens_per_second": self._metrics.rate()}
        stats["prefix_hit_rate"] = stats["prefix_found_tokens"] / (stats["prefix_asked_tokens"] or 1)
        for name, words in GAUGES.items():
            yield GaugeMetricFamily(f"llmkernels_{name}", words, stats[name])
        for name, words in COUNTERS.items():
            yield CounterMetricFamily(f"llmkernels_{name}", words, stats[name])
        calls = CounterMetricFamily("llmkernels_op_calls", "Calls of ops.", labels=["op", "backend"])
        for op, backends in stats["ops"].items():
            for backend, row in backends.items():
                calls.add_metric([op, backend], row["calls"])
        yield calls
