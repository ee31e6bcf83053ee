"""The scheduler, with integers only: nobody is lost, pages belong to one, the budget holds, first come first served."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkernels.engine.pages import PagePool
from llmkernels.engine.prefix import PrefixCache
from llmkernels.engine.scheduler import Scheduler
from llmkernels.engine.sequence import Sequence

END = 7  # the token that ends a text


def scheduler(pages=64, page_size=4, max_batch_tokens=16, max_sequences=4):
    return Scheduler(PagePool(pages), page_size, max_batch_tokens, max_sequences)


def sequence(prompt, answer, **more):
    return Sequence([1] * prompt, prompt, prompt + answer, frozenset([END]), **more)


def check_step(s, chunks):
    """What must hold of every step, whatever came before."""
    assert sum(chunk.count for chunk in chunks) <= s.max_batch_tokens
    assert [chunk.sequence for chunk in chunks] == s.running
    assert len(chunks) <= s.max_sequences
    owned = [page for q in s.running for page in q.pages]
    assert len(owned) == len(set(owned)), "a page has two owners"
    assert len(owned) + s.pool.free == s.pool.pages, "a page is lost"
    assert not any(q.pages or q.computed for q in s.waiting)
    order = [q.payload for q in (*s.running, *s.waiting)]
    assert order == sorted(order), "somebody overtook"
    for chunk in chunks:
        q = chunk.sequence
        assert chunk.count >= 1
        assert chunk.start == q.computed
        assert chunk.start + chunk.count <= len(q.tokens) <= len(q.pages) * s.page_size
        assert chunk.samples == (chunk.start + chunk.count == len(q.tokens))


def run(s, sequences, arrivals, aborts=(), ends=()):
    """Everything to its end; aborts are (step, which), ends are (which, length at which it says END)."""
    queue, step, admitted = sorted(zip(arrivals, range(len(sequences)), strict=True)), 0, []
    stops = dict(ends)
    for name, (_, index) in enumerate(queue):
        sequences[index].payload = name  # the order of arrival
    while queue or s.waiting or s.running:
        while queue and queue[0][0] <= step:
            s.add(sequences[queue.pop(0)[1]])
        for at, index in aborts:
            if at == step and (sequences[index] in s.waiting or sequences[index] in s.running):
                s.end(sequences[index])
        before = s.preemptions
        chunks = s.schedule()
        assert chunks or not (s.waiting or s.running), "everybody waits for nobody"
        check_step(s, chunks)
        if s.preemptions == before and any(not chunk.samples for chunk in chunks):
            assert sum(chunk.count for chunk in chunks) == s.max_batch_tokens, "budget is left, and so is work"
        admitted += [c.sequence for c in chunks if c.sequence not in admitted]
        sampling = [c.sequence for c in chunks if c.samples]
        s.advance(chunks, [END if stops.get(q.payload) == len(q.tokens) else 0 for q in sampling])
        step += 1
        assert step < 5000, "no end"
    assert s.pool.free == s.pool.pages
    return admitted


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_comes_all_get_their_answer(data):
    page_size = data.draw(st.sampled_from([1, 3, 16]))
    budget = data.draw(st.integers(1, 20))
    requests = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=9))
    enough = max(-(-(p + a - 1) // page_size) for p, a in requests)  # for the largest alone
    pages = data.draw(st.integers(enough, 3 * enough))
    s = scheduler(pages, page_size, budget, data.draw(st.integers(1, budget)))
    sequences = [sequence(p, a) for p, a in requests]
    arrivals = [data.draw(st.integers(0, 30)) for _ in requests]
    which = st.integers(0, len(requests) - 1)
    aborts = data.draw(st.lists(st.tuples(st.integers(0, 60), which), max_size=3))
    ends = data.draw(st.lists(st.tuples(which, st.integers(1, 45)), max_size=3))
    admitted = run(s, sequences, arrivals, aborts, ends)
    assert [q.payload for q in admitted] == sorted(q.payload for q in admitted)
    for q, (prompt, answer) in zip(sequences, requests, strict=True):
        new = len(q.tokens) - prompt
        assert q.finish_reason in ("stop", "length", "abort")
        assert q.finish_reason != "length" or new == answer
        assert q.finish_reason != "stop" or (q.tokens[-1] == END and END not in q.tokens[:-1])
        assert q.finish_reason != "abort" or q in [sequences[index] for _, index in aborts]


def test_prefill_and_decode_share_a_step():
    s = scheduler(max_batch_tokens=10)
    first, second = sequence(3, 5, payload=0), sequence(20, 5, payload=1)
    s.add(first)
    s.advance(s.schedule(), [0])
    s.add(second)
    counts = []
    for _ in range(3):
        chunks = s.schedule()
        counts.append([(chunk.count, chunk.samples) for chunk in chunks])
        s.advance(chunks, [0] * sum(chunk.samples for chunk in chunks))
    assert counts == [[(1, True), (9, False)], [(1, True), (9, False)], [(1, True), (2, True)]]


def test_a_long_prompt_does_not_starve_those_who_decode():
    s = scheduler(max_batch_tokens=4, max_sequences=3)
    for _ in range(2):
        s.add(sequence(1, 9))
    s.add(sequence(30, 1))
    s.advance(s.schedule(), [0, 0])
    assert [chunk.count for chunk in s.schedule()] == [1, 1, 2]


def test_the_youngest_yields_and_keeps_its_tokens():
    s = scheduler(pages=4, page_size=2, max_batch_tokens=8)
    old, young = sequence(3, 5, payload=0), sequence(3, 5, payload=1)
    s.add(old)
    s.add(young)
    for _ in range(2):
        s.advance(s.schedule(), [5, 6])
    assert [chunk.sequence for chunk in s.schedule()] == [old]  # its fifth token needs a third page
    assert (young.tokens, young.computed, young.pages) == ([1, 1, 1, 6, 6], 0, [])
    assert s.preemptions == 1
    assert s.waiting[0] is young


def test_who_can_never_fit_is_refused_at_once():
    s = scheduler(pages=4, page_size=4)
    s.add(sequence(10, 7))  # 17 tokens; the keys of the last are never needed
    with pytest.raises(ValueError, match=r"18 tokens, 5 pages of 4; the cache has 4: .* kv_cache_pages"):
        s.add(sequence(10, 8))


def test_an_aborted_sequence_ignores_the_step_it_was_in():
    s = scheduler()
    q = sequence(3, 5)
    s.add(q)
    chunks = s.schedule()
    s.end(q)
    s.end(q)
    s.advance(chunks, [0])
    assert (q.finish_reason, q.tokens, s.pool.free) == ("abort", [1, 1, 1], s.pool.pages)


@pytest.mark.parametrize("sizes", [(4, 5), (4, 0)])
def test_a_budget_too_small_for_the_sequences(sizes):
    with pytest.raises(ValueError, match=r"max_sequences is . and max_batch_tokens 4"):
        scheduler(max_batch_tokens=sizes[0], max_sequences=sizes[1])


@pytest.mark.parametrize("reuse", [False, True])
def test_a_preempted_request_is_not_taken_for_decode(reuse):
    """It waits with a token sampled and no keys; back again it computes all, or what the prefix cache lost."""
    pool = PagePool(4)
    s = Scheduler(pool, 2, 8, 4, PrefixCache(pool, 2) if reuse else None, guesses=3)
    old, young = Sequence([1, 2, 3], 3, 6), Sequence([4, 5, 6], 3, 8)
    s.add(old)
    s.add(young)
    while not s.preemptions:
        chunks = s.schedule()
        s.advance(chunks, [7] * len(chunks))
    assert (young.computed, young.settled, young.pages) == (0, 0, [])
    while not old.finish_reason:
        s.advance(s.schedule(), [7])
    (chunk,) = s.schedule()
    assert chunk.sequence is young
    assert chunk.start == (2 if reuse else 0)
    assert (chunk.start + chunk.count, chunk.samples, chunk.room) == (len(young.tokens), True, 0)


def test_guesses_take_what_is_left_and_give_it_back():
    s = Scheduler(PagePool(6), 4, 12, 3, guesses=4)
    first, second = Sequence([1] * 3, 3, 40 - 17), Sequence([2] * 7, 7, 16)
    s.add(first)
    s.add(second)
    s.advance(s.schedule(), [0, 0])
    chunks = s.schedule()
    assert [chunk.room for chunk in chunks] == [4, 4]  # of 12 tokens two are theirs
    assert [len(chunk.sequence.pages) for chunk in chunks] == [2, 3]
    s.advance(chunks, [0, 0])  # nobody guessed
    assert [len(q.pages) for q in (first, second)] == [2, 3]  # the fifth and the ninth token
    third = Sequence([3] * 4, 4, 9)
    s.add(third)
    chunks = s.schedule()
    assert [(chunk.count, chunk.room) for chunk in chunks] == [(1, 3), (1, 3), (4, 0)]
    chunks[0].guesses, chunks[0].parents, chunks[0].accepted = [9, 9], [-1, 0], [9, 9]
    assert s.advance(chunks, [0, 0, 0]) == [3, 1, 1]
    assert (first.computed, first.settled, len(first.tokens)) == (7, 5, 8)
