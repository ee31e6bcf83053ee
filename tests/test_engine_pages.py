"""Scheduler, pages, prefix tree and speculation as one machine, without tensors: whatever happens in whatever order,
every page is explained, every key is that of its own tokens, and everybody gets the text that nobody else changes."""

import random
from itertools import takewhile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llmkernels.engine.audit import problems
from llmkernels.engine.pages import PagePool
from llmkernels.engine.prefix import PrefixCache
from llmkernels.engine.sampling import Chosen
from llmkernels.engine.scheduler import Scheduler
from llmkernels.engine.sequence import Sequence
from llmkernels.engine.speculative import accept

END = 9


def following(scope, tokens, answer):
    """The token that comes after these, for the answer-th of several: of few kinds, so that prefixes repeat."""
    number = hash((scope or 0, answer, *tokens[-3:], len(tokens))) % 23
    return END if number == 22 else number % 3


def known(sequence, computed):
    """How many tokens a draft model has the keys of."""
    return max(sequence.settled, min(sequence.drafted, computed))


class Pages(RuleBasedStateMachine):
    """A page's memory is imitated by what its keys depend on: all tokens up to there, and the scope."""

    @initialize(
        page_size=st.sampled_from([1, 2, 3, 4]),
        budget=st.integers(2, 24),
        reuse=st.booleans(),
        guesses=st.integers(0, 9),
        seed=st.integers(0, 2**16),
    )
    def start(self, page_size, budget, reuse, guesses, seed):
        self.size, self.random = page_size, random.Random(seed)
        pages = -(-24 // page_size) + self.random.randrange(20)
        self.pool = PagePool(pages)
        self.prefix = PrefixCache(self.pool, page_size) if reuse else None
        sequences = self.random.randint(1, min(budget, 6))
        self.scheduler = Scheduler(self.pool, page_size, budget, sequences, self.prefix, guesses)
        self.keys = [[[None] * page_size for _ in range(pages)] for _ in range(2)]  # of the model, of its draft model
        self.everyone, self.aborted = [], set()

    @rule(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=12), answer=st.integers(1, 12), n=st.integers(1, 3))
    def ask(self, prompt, answer, n):
        scope = self.random.choice([None, None, 7])
        limit = min(24, len(prompt) + answer)
        family = [Sequence([*prompt], len(prompt), limit, frozenset([END]), scope, payload=i) for i in range(n)]
        family[0].forks = family[1:]
        self.scheduler.add(family[0])
        self.everyone += family

    @rule(which=st.randoms(use_true_random=False))
    def abort(self, which):
        if self.everyone:
            sequence = which.choice(self.everyone)
            if not sequence.finish_reason:
                self.aborted.add(sequence)
            self.scheduler.end(sequence)

    @rule(which=st.randoms(use_true_random=False))
    def branch(self, which):
        """As beams do: one more that goes on behind some of a text's tokens."""
        if self.scheduler.running and len(self.scheduler.running) < 2 * self.scheduler.max_sequences:
            sequence = which.choice(self.scheduler.running)
            length = which.randint(1, len(sequence.tokens))
            if length < sequence.limit - 1 and not sequence.forks:
                child = self.scheduler.fork(sequence, length, which.randint(0, 2))
                child.prompt_length = length + 1
                self.everyone.append(child)

    @rule()
    def step(self):
        chunks = self.scheduler.schedule()
        assert chunks or not (self.scheduler.waiting or self.scheduler.running), "everybody waits for nobody"
        assert sum(chunk.count + chunk.room for chunk in chunks) <= self.scheduler.max_batch_tokens
        for keys in self.keys:
            for chunk in chunks:
                if chunk.copy:
                    keys[chunk.copy[1]] = [*keys[chunk.copy[0]]]
        writers, self.drafted = {}, {}
        for chunk in chunks:
            for _ in range(self.random.randint(0, chunk.room)):
                parent = self.random.randint(-1, len(chunk.guesses) - 1)
                text = self.after(chunk, parent)
                right = following(chunk.sequence.scope, text, chunk.sequence.payload)
                chunk.guess(parent, self.random.choice([right, right, 0, END]))
            sequence, end = chunk.sequence, chunk.start + chunk.count
            assert sequence.settled <= chunk.start
            for i in range(chunk.start, end):
                self.write(0, sequence, i, sequence.tokens[: i + 1], writers)
            for i in range(known(sequence, chunk.start), end):
                self.write(1, sequence, i, sequence.tokens[: i + 1], writers)
            for node in range(len(chunk.guesses)):
                self.write(0, sequence, end + node, self.after(chunk, node), writers)
                self.write(1, sequence, end + node, ["draft"], writers)
            last = self.random.randint(-1, len(chunk.guesses) - 1)  # the draft model has read this path as well
            self.drafted[id(chunk)] = [chunk.guesses[node] for node in chunk.path(last)]
            for i, node in enumerate(chunk.path(last)):
                self.write(1, sequence, end + i, self.after(chunk, node), writers)
        for chunk in chunks:
            self.read(0, chunk.sequence, chunk.start + chunk.count)
            self.read(1, chunk.sequence, chunk.start + chunk.count)
            assert all(self.pool.users(page) == 1 for page in chunk.sequence.pages if page in writers)
        self.advance(chunks)

    def advance(self, chunks):
        ends = [chunk for chunk in chunks if chunk.samples]
        sampled = []
        for chunk in ends:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            texts = [self.after(chunk, node) for node in range(-1, len(chunk.guesses))]
            chosen = [Chosen(following(sequence.scope, text, sequence.payload)) for text in texts]
            taken, nodes = accept(chunk, chosen)
            sampled.append(taken[-1].token)
            true = takewhile(
                lambda pair: pair[0] == pair[1], zip(chunk.accepted, self.drafted[id(chunk)], strict=False)
            )
            sequence.drafted = end + len([*true])
            moved = [self.at(0, sequence, end + node) for node in nodes]
            for i, key in enumerate(moved):
                page, offset = divmod(end + i, self.size)
                self.keys[0][sequence.pages[page]][offset] = key
        before = [len(chunk.sequence.tokens) for chunk in ends]
        gained = self.scheduler.advance(chunks, sampled)
        assert gained == [len(chunk.sequence.tokens) - n for chunk, n in zip(ends, before, strict=True)]
        for sequence in self.scheduler.running:
            self.read(0, sequence, sequence.computed)
            self.read(1, sequence, known(sequence, sequence.computed))

    def after(self, chunk, node):
        end = chunk.start + chunk.count
        return chunk.sequence.tokens[:end] + [chunk.guesses[i] for i in chunk.path(node)]

    def write(self, which, sequence, position, text, writers):
        page, offset = divmod(position, self.size)
        page, key = sequence.pages[page], (sequence.scope, *text)
        if self.keys[which][page][offset] == key:
            return  # computed again, as forks do with the prompt's last token: others may read it meanwhile
        assert writers.setdefault(page, sequence) is sequence, "two write into one page"
        self.keys[which][page][offset] = key

    def at(self, which, sequence, position):
        page, offset = divmod(position, self.size)
        return self.keys[which][sequence.pages[page]][offset]

    def read(self, which, sequence, count):
        for i in range(count):
            assert self.at(which, sequence, i) == (sequence.scope, *sequence.tokens[: i + 1]), "somebody else's key"

    @invariant()
    def pages_are_explained(self):
        assert not [*problems(self.scheduler)]
        for sequence in self.scheduler.running:
            assert len(sequence.pages) <= -(-len(sequence.tokens) // self.size), "a page is held for what was guessed"
        for _, node in self.prefix.walk() if self.prefix else ():
            known, above = [], node
            while above.parent:
                known = [*above.tokens, *known]
                above = above.parent
            for keys in self.keys:  # what anybody may find is there, and true
                first, there = len(known) - len(node.tokens), keys[node.page][: len(node.tokens)]
                assert there == [(node.scope, *known[: i + 1]) for i in range(first, len(known))]

    @invariant()
    def nobody_is_lost(self):
        alive = {*self.scheduler.running, *self.scheduler.waiting}
        alive |= {fork for sequence in alive for fork in sequence.forks}
        assert alive == {sequence for sequence in self.everyone if not sequence.finish_reason}

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            self.step()
        self.pages_are_explained()
        assert self.pool.free == self.pool.pages
        for sequence in self.everyone:
            text = sequence.tokens[: sequence.prompt_length]
            while len(text) < len(sequence.tokens):
                text.append(following(sequence.scope, text, sequence.payload))
            assert sequence.tokens == text, "not the tokens of plain sampling"
            if sequence not in self.aborted:
                whole = sequence.tokens[-1] == END or len(sequence.tokens) == sequence.limit
                assert whole
                assert END not in sequence.tokens[:-1]


Pages.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPages = Pages.TestCase
