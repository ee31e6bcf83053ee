"""Which pages of the cache are in use, by how many sequences, and which unused ones hold keys worth keeping.

    empty --take--> in use --give_back--> empty
                     |   ^
      give_back, if  |   |  share, by who finds
      it is kept     v   |  the same prefix
                     idle ----------------> taken again, when no page is empty: the one longest idle first

Plain integers; the arrays are KVCache's.
"""

from collections.abc import Callable, Sequence


class PagePool:
    """Pages 0 to pages - 1 and their users.

    evicted: told of each idle page that is about to be taken again, so that nobody looks for its keys any more.
    """

    def __init__(self, pages: int):
        self.pages = pages
        self.evicted: Callable[[int], None] = lambda page: None
        self._users = [0] * pages
        self._kept: set[int] = set()
        self._empty = list(range(pages - 1, -1, -1))  # a stack: the page freed last, maybe still in cache, goes first
        self._idle: dict[int, None] = {}  # in the order in which they became idle

    @property
    def free(self) -> int:
        """How many pages `take` can give: empty and idle ones."""
        return len(self._empty) + len(self._idle)

    @property
    def idle(self) -> int:
        """How many pages nobody uses whose keys are kept."""
        return len(self._idle)

    def users(self, page: int) -> int:
        """How many sequences use the page."""
        return self._users[page]

    def own(self, page: int) -> bool:
        """Whether its one user may write into the page: no other uses it, and it is not kept for those who come."""
        return self._users[page] == 1 and page not in self._kept

    def take(self, count: int) -> list[int] | None:
        """`count` pages that now have one user, the caller; None, and nothing taken, where fewer are free."""
        if count > self.free:
            return None
        taken = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Each of these pages, in use or idle, has one user more."""
        for page in pages:
            if not self._users[page]:
                if page not in self._idle:
                    raise ValueError(f"page {page} is shared but empty")
                del self._idle[page]
            self._users[page] += 1

    def keep(self, page: int) -> None:
        """The page, which is its user's own, becomes idle rather than empty when its last user gives it back."""
        if not self.own(page):
            raise ValueError(f"page {page} is to be kept but is not in use, not of one user, or kept already")
        self._kept.add(page)

    def give_back(self, pages: Sequence[int]) -> None:
        """Each page has one user less; one that had none is a bug of the caller: ValueError.

        From the last to the first: the end of a prefix becomes idle, and is taken again, before its beginning, on
        which other ends may depend.
        """
        for page in reversed(pages):
            if not self._users[page]:
                raise ValueError(f"page {page} was given back but is not in use")
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._kept:
                self._idle[page] = None
            else:
                self._empty.append(page)

    def _evict(self) -> int:
        page = next(iter(self._idle))
        del self._idle[page]
        self._kept.remove(page)
        self.evicted(page)
        return page
