"""Automatic prefix reuse: a radix tree over token prefixes finds pages whose keys are computed already.

RadixAttention, Zheng et al. 2024, https://arxiv.org/abs/2312.07104.  A digit of the tree is a page of tokens, so an
edge is one page, and a lookup compares the tokens themselves: no hash decides.

    root of a scope -- [the system prompt's 1st page] -- [its 2nd page] -+- [one chat's 1st page] -- ...
                                                                         +- [another chat's 1st page]

A page enters when it is full, so two requests that run at the same time share as well, and when two computed the same
page, the second one's is freed.  A sequence uses every page from the root down to its own, so a page's users are never
fewer than those of a page below it; and since sequences give back their last page first, the page that has been idle
longest is always a leaf.  That is the whole eviction policy: least recently used, leaves first, in constant time.

The last page of a sequence that ends, which is not full, is kept as well, and is always a leaf.  A page that is kept
is never written again: where a prompt leaves the tree within a page, full or not, it goes on in a copy.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from llmkernels.engine.pages import PagePool

WORTH_A_COPY = 4  # a page is copied for a quarter of its tokens or more


@dataclass(slots=True, eq=False)
class Node:
    """A page, the tokens whose keys it holds, and the pages that continue it, by their tokens.  A root has no page.

    latest: of the children that begin with a token, the one that came last.
    """

    page: int
    tokens: tuple[int, ...]
    parent: "Node | None"
    scope: Hashable
    children: dict[tuple[int, ...], "Node"] = field(default_factory=dict)
    latest: dict[int, "Node"] = field(default_factory=dict)


class PrefixCache:
    """The tree over the pages of a pool.

    A scope is what keys depend on besides the tokens: the adapter, and a salt where requests must not learn from one
    another's timing what the others asked.

    found, asked: tokens of admitted prompts whose keys were there, and all of them.
    """

    def __init__(self, pool: PagePool, page_size: int):
        self.pool, self.page_size = pool, page_size
        self.found = self.asked = 0
        self._roots: dict[Hashable, Node] = {}
        self._nodes: dict[int, Node] = {}
        pool.evicted = self._forget

    @property
    def pages(self) -> int:
        """How many pages it knows, in use or idle."""
        return len(self._nodes)

    def match(self, scope: Hashable, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The pages that hold the keys of the longest known prefix of `tokens`, and its length in tokens.

        The caller is a user of each page now.  Of the last one maybe not all tokens are part of the prefix.
        """
        pages = self.peek(scope, tokens)
        count = len(pages) * self.page_size
        node, rest = self._nodes[pages[-1]] if pages else self._roots.get(scope), tokens[count:]
        if node and rest and (child := node.latest.get(rest[0])):
            equal = takewhile(lambda pair: pair[0] == pair[1], zip(child.tokens, rest, strict=False))
            if (more := len([*equal])) * WORTH_A_COPY >= self.page_size:
                pages.append(child.page)
                count += more
        self.pool.share(pages)
        return pages, count

    def peek(self, scope: Hashable, tokens: Sequence[int]) -> list[int]:
        """The whole pages that `match` would give now, without using them."""
        pages: list[int] = []
        node = self._roots.get(scope)
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            node = node and node.children.get(tuple(tokens[start : start + self.page_size]))
            if node is None:
                break
            pages.append(node.page)
        return pages

    def add(self, scope: Hashable, before: int | None, tokens: Sequence[int], page: int) -> int:
        """Keep a page's keys for others.  Returns the page to use from now on: this one, or its double.

        Args:
            before: the page before it in its sequence, which was added before; None for the first one.
            tokens: the page_size tokens of the page; fewer where its sequence ends.
            page: a page of the caller's own; see PagePool.own.
        """
        key = tuple(tokens)
        parent = self._nodes[before] if before is not None else self._roots.setdefault(scope, Node(-1, (), None, scope))
        known = parent.children.get(key)
        if known is None:
            self._nodes[page] = parent.children[key] = parent.latest[key[0]] = Node(page, key, parent, scope)
            self.pool.keep(page)
            return page
        self.pool.share([known.page])
        self.pool.give_back([page])
        return known.page

    def walk(self) -> Iterator[tuple[int, Node]]:
        """Every page with its depth, parents before their children: for whoever draws the tree."""
        stack = [(0, node) for root in self._roots.values() for node in root.children.values()]
        while stack:
            depth, node = stack.pop()
            yield depth, node
            stack += [(depth + 1, child) for child in node.children.values()]

    def _forget(self, page: int) -> None:
        node = self._nodes.pop(page)
        assert node.parent is not None  # only roots have none, and no page
        assert not node.children, "a page below is still kept"
        del node.parent.children[node.tokens]
        if node.parent.latest.get(node.tokens[0]) is node:
            del node.parent.latest[node.tokens[0]]
        if node.parent.parent is None and not node.parent.children:
            del self._roots[node.scope]
