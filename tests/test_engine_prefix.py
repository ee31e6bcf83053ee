"""Pages that are shared: whatever is reused, forked, copied, evicted or preempted, all read keys of their own tokens.

A page's memory is imitated by a list of prefixes: the key of a token depends on all tokens up to it, and on the scope.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkernels.engine.audit import problems
from llmkernels.engine.pages import PagePool
from llmkernels.engine.prefix import PrefixCache
from llmkernels.engine.scheduler import PATIENCE, Scheduler
from llmkernels.engine.sequence import Sequence


class Memory:
    """A scheduler and what would be in its pages."""

    def __init__(self, pages=32, page_size=2, max_batch_tokens=8, max_sequences=4, reuse=True):
        self.pool, self.size = PagePool(pages), page_size
        self.prefix = PrefixCache(self.pool, page_size) if reuse else None
        self.scheduler = Scheduler(self.pool, page_size, max_batch_tokens, max_sequences, self.prefix)
        self.slots = [[None] * page_size for _ in range(pages)]
        self.ran = 0  # tokens computed

    def step(self, next_token=lambda sequence: 0, meanwhile=lambda: None):
        chunks = self.scheduler.schedule()
        for chunk in chunks:
            if chunk.copy:
                self.slots[chunk.copy[1]] = [*self.slots[chunk.copy[0]]]
        writers, changed = {}, set()
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            for i in range(chunk.start, end):
                page = sequence.pages[i // self.size]
                assert writers.setdefault(page, sequence) is sequence, "two write into one page"
                key = (sequence.scope, *sequence.tokens[: i + 1])
                if self.slots[page][i % self.size] != key:  # a fork writes its prompt's last token again
                    changed.add(page)
                self.slots[page][i % self.size] = key
            self.ran += chunk.count
        for chunk in chunks:
            sequence = chunk.sequence
            assert all(self.pool.users(page) == 1 or page not in changed for page in sequence.pages)
            for i in range(chunk.start + chunk.count):
                key = self.slots[sequence.pages[i // self.size]][i % self.size]
                assert key == (sequence.scope, *sequence.tokens[: i + 1]), "somebody else's key"
        meanwhile()
        self.scheduler.advance(chunks, [next_token(chunk.sequence) for chunk in chunks if chunk.samples])
        self.check()
        return chunks

    def check(self):
        assert not list(problems(self.scheduler))

    def run(self, *sequences, next_token=lambda sequence: 0):
        for sequence in sequences:
            self.scheduler.add(sequence)
        steps = 0
        while self.scheduler.waiting or self.scheduler.running:
            self.step(next_token)
            steps += 1
            assert steps < 3000, "no end"
        return sequences


def ask(tokens, answer=3, **more):
    return Sequence([*tokens], len(tokens), len(tokens) + answer, **more)


def forked(tokens, n, answer=3, **more):
    first, *others = [ask(tokens, answer, **more) for _ in range(n)]
    first.forks = others
    return [first, *others]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_everyone_reads_the_keys_of_its_own_tokens(data):
    page_size, budget = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.integers(1, 12))
    prompts = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=8))
    answers = [data.draw(st.integers(1, 6)) for _ in prompts]
    enough = max(-(-(len(p) + a - 1) // page_size) for p, a in zip(prompts, answers, strict=True))
    memory = Memory(
        data.draw(st.integers(enough, 3 * enough)),
        page_size,
        budget,
        data.draw(st.integers(1, budget)),
        reuse=data.draw(st.booleans()),
    )
    families = [
        forked(prompt, data.draw(st.sampled_from([1, 1, 2, 3])), answer, scope=data.draw(st.sampled_from([None, "b"])))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    everyone = [sequence for family in families for sequence in family]
    for number, sequence in enumerate(everyone):
        sequence.payload = number
    arrivals = sorted((data.draw(st.integers(0, 20)), number) for number in range(len(families)))
    aborts = data.draw(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(everyone)), max_size=4))
    step = 0
    while arrivals or memory.scheduler.waiting or memory.scheduler.running:
        while arrivals and arrivals[0][0] <= step:
            memory.scheduler.add(families[arrivals.pop(0)[1]][0])

        def abort(step=step):
            for at, sequence in aborts:
                if at == step:
                    memory.scheduler.end(sequence)

        memory.step(lambda sequence: (sequence.payload + len(sequence.tokens)) % 2, abort)
        step += 1
        assert step < 3000, "no end"
    assert memory.pool.free == memory.pool.pages
    aborted = [sequence for _, sequence in aborts]
    for sequence in everyone:
        assert sequence.finish_reason == "length" or sequence in aborted
        assert sequence.finish_reason != "length" or len(sequence.tokens) == sequence.limit


def test_a_prompt_is_found_again_and_so_is_its_answer():
    memory = Memory(page_size=4)
    (first,) = memory.run(ask(range(10), answer=8))
    assert first.cached == 0
    (again,) = memory.run(ask(range(10)))
    assert again.cached == 9  # two pages, and a token of the third
    (turn,) = memory.run(ask([*first.tokens, 5, 5, 5]))
    assert turn.cached == 17  # all whose keys were computed
    assert memory.prefix.found == 26


def test_a_prompt_wholly_known_still_computes_its_last_token():
    """At a page's end nothing would be left to compute, and so no logits to sample from."""
    memory = Memory(page_size=4)
    memory.run(ask(range(8)))
    before = memory.ran
    (again,) = memory.run(ask(range(8), answer=1))
    assert again.cached == 7
    assert memory.ran - before == 1


def test_requests_that_run_together_share_what_is_full():
    memory = Memory(page_size=2, max_batch_tokens=16)
    one, two = ask(range(6), answer=9), ask(range(6), answer=9)
    memory.scheduler.add(one)
    memory.scheduler.add(two)
    memory.step()  # both computed the same three pages
    assert one.pages == two.pages
    assert memory.pool.free == memory.pool.pages - 3
    memory.step()
    assert len({*one.pages, *two.pages}) == 5


def test_scopes_share_nothing():
    memory = Memory()
    memory.run(ask(range(8), scope="mine"))
    (other,) = memory.run(ask(range(8), scope="yours"))
    assert other.cached == 0


def test_the_least_recently_used_leaf_goes_first():
    memory = Memory(pages=6, page_size=2)
    memory.run(ask([1, 2, 3, 4], answer=1))
    memory.run(ask([1, 2, 7, 8], answer=1))
    memory.run(ask([1, 2, 3, 4], answer=1))  # used again
    assert {node.tokens for _, node in memory.prefix.walk()} == {(1, 2), (3, 4), (7, 8)}
    memory.run(ask([6] * 8, answer=1))  # four pages, of which three were empty
    assert {node.tokens for _, node in memory.prefix.walk()} == {(1, 2), (3, 4), (6, 6)}
    memory.run(ask([0] * 12, answer=1))  # everything
    assert {node.tokens for _, node in memory.prefix.walk()} == {(0, 0)}
    assert len(memory.prefix._roots) == 1


def test_a_page_known_in_part_is_copied_and_stays_as_it_is():
    memory = Memory(page_size=8)
    memory.run(ask([1, 2, 3, 4, 5, 6, 7, 8, 9], answer=1))
    pages = {node.page: [*memory.slots[node.page]] for _, node in memory.prefix.walk()}
    for prompt, cached in (([1, 2, 3, 4, 5, 0, 0], 5), ([1, 0, 0], 0), ([1, 2, 3, 4, 5, 6, 7, 8, 9, 9], 8)):
        before = memory.ran
        (again,) = memory.run(ask(prompt, answer=1))
        assert again.cached == cached
        assert memory.ran - before == len(prompt) - again.cached
    assert all(memory.slots[page] == keys for page, keys in pages.items())


def test_who_finds_no_room_for_a_copy_does_without():
    memory = Memory(pages=2, page_size=4, max_sequences=1)
    memory.run(ask([1, 2, 3, 4, 5, 6, 7], answer=1))
    (again,) = memory.run(ask([1, 2, 3, 4, 5, 6, 0, 0], answer=1))  # needs both pages, the one to copy from among them
    assert again.cached == 4
    assert again.finish_reason == "length"


def test_a_fork_that_ends_before_it_ran_leaves_the_page_it_shared_as_it_is():
    memory = Memory(pages=4, page_size=4)
    first, fork = forked(range(8), 2)
    memory.scheduler.add(first)
    memory.step()  # the fork is to compute the prompt's last token again, and holds both pages, full and kept
    for sequence in (first, fork):
        memory.scheduler.end(sequence)
        memory.check()
    assert [node.tokens for _, node in memory.prefix.walk()] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    memory.run(ask([1] * 13, answer=1))  # takes every page


def test_what_was_to_be_copied_into_is_not_kept_when_its_step_never_ran():
    memory = Memory(pages=8, page_size=4)
    first, fork = forked(range(7), 2)
    memory.scheduler.add(first)
    memory.step()
    copies = [chunk.copy for chunk in memory.scheduler.schedule()]
    assert copies[0] is not None
    for sequence in (fork, first):
        memory.scheduler.end(sequence)
    memory.check()
    memory.run(ask(range(8)))  # reads what is kept


@pytest.mark.parametrize("length", [7, 8])
def test_forks_compute_the_prompt_once_and_copy_when_they_write(length):
    memory = Memory(page_size=4, max_batch_tokens=16)
    family = forked(range(length), 3, answer=4)
    memory.scheduler.add(family[0])
    memory.step()
    assert memory.ran == length
    assert family[0].pages == family[1].pages == family[2].pages
    chunks = memory.step(lambda sequence: family.index(sequence))
    copies = [chunk.copy for chunk in chunks if chunk.copy]
    assert len(copies) == 2  # the last of three need not
    assert memory.ran == length + 3
    memory.run()
    assert [s.tokens[length + 1] for s in family[1:]] != family[0].tokens[length + 1 :]
    assert all(s.finish_reason == "length" for s in family)


def test_forks_that_find_no_seat_wait_for_one():
    memory = Memory(page_size=4, max_batch_tokens=16, max_sequences=2)
    family = forked(range(9), 5)
    memory.run(family[0])
    assert all(len(s.tokens) == 12 for s in family)
    assert [s.cached for s in family] == [0, 8, 8, 8, 8]


@pytest.mark.parametrize("when", ["waiting", "half", "forked"])
def test_an_aborted_fork_or_parent_leaves_the_others(when):
    memory = Memory(page_size=2, max_batch_tokens=4)
    family = forked(range(6), 3)
    memory.scheduler.add(family[0])
    for _ in range({"waiting": 0, "half": 1, "forked": 2}[when]):
        memory.step()
    memory.scheduler.end(family[0])
    memory.scheduler.end(family[2])
    memory.run()
    assert [s.finish_reason for s in family] == ["abort", "length", "abort"]
    assert memory.pool.free == memory.pool.pages


def test_a_preempted_sequence_finds_what_is_left_of_its_prefix():
    memory = Memory(pages=8, page_size=2, max_batch_tokens=8, max_sequences=2)
    old, young = ask([1] * 6, answer=7), ask([2] * 4, answer=9)
    memory.run(old, young)
    assert memory.scheduler.preemptions
    assert (len(old.tokens), len(young.tokens)) == (13, 13)


def test_a_page_given_back_twice_is_a_bug_that_shows():
    pool = PagePool(3)
    pages = pool.take(2)
    assert pool.take(2) is None
    assert pool.free == 1
    pool.give_back(pages)
    for wrong in (pool.give_back, pool.share):
        with pytest.raises(ValueError, match=r"page . (was given back|is shared) but"):
            wrong(pages)
    with pytest.raises(ValueError, match="not in use"):
        pool.keep(pages[0])


def test_who_finds_a_longer_prefix_goes_first_but_not_for_ever():
    memory = Memory(pages=64, page_size=2, max_batch_tokens=8, max_sequences=1)
    memory.run(ask([1] * 8, answer=1))
    stranger, order = ask([2] * 8, answer=1), []
    memory.scheduler.add(ask([3] * 8, answer=1))
    memory.step()
    memory.scheduler.add(stranger)
    friends = [ask([1] * 8, answer=1) for _ in range(PATIENCE + 3)]
    for friend in friends:
        memory.scheduler.add(friend)
    while memory.scheduler.waiting:
        order += [chunk.sequence for chunk in memory.step()]
    assert order == [*friends[:PATIENCE], stranger, *friends[PATIENCE:]]


def test_an_audit_finds_what_is_wrong():
    memory = Memory(page_size=2)
    memory.scheduler.add(ask(range(5)))
    memory.step()
    (running,) = memory.scheduler.running
    memory.pool.take(1)
    assert [text for text in problems(memory.scheduler) if "counts 1 users, and 0 sequences use it" in text]
    memory.pool.share(running.pages[1:2])
    assert [text for text in problems(memory.scheduler) if "before it" in text]
    running.computed = 99
    assert [text for text in problems(memory.scheduler) if "claims 99" in text]
