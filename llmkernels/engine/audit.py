"""Is every page of the cache accounted for?  Read by tests and by whoever suspects a leak; changes nothing.

A page is empty, idle with keys that the prefix cache knows, or in use; and who uses it are the sequences that run.
"""

from collections import Counter
from collections.abc import Iterator

from llmkernels.engine.scheduler import Scheduler


def problems(scheduler: Scheduler) -> Iterator[str]:
    """What does not add up, in words; nothing between two steps of an engine that is right."""
    pool, prefix = scheduler.pool, scheduler.prefix
    users = Counter(page for sequence in scheduler.running for page in sequence.pages)
    for page in range(pool.pages):
        if pool.users(page) != users[page]:
            yield f"page {page} counts {pool.users(page)} users, and {users[page]} sequences use it"
    used = sum(pool.users(page) > 0 for page in range(pool.pages))
    if used + pool.free != pool.pages:
        yield f"{used} pages are in use and {pool.free} free, of {pool.pages}"
    for sequence in scheduler.running:
        if len(set(sequence.pages)) != len(sequence.pages):
            yield f"a sequence of {len(sequence.tokens)} tokens uses a page twice"
        count = len(sequence.tokens)
        if sequence.computed > min(count, len(sequence.pages) * scheduler.page_size):
            yield f"a sequence of {count} tokens claims {sequence.computed} in {len(sequence.pages)} pages"
        if sequence.finish_reason:
            yield f"a sequence that ended by {sequence.finish_reason} still runs"
    for sequence in scheduler.waiting:
        if sequence.pages or sequence.computed:
            yield f"a sequence that waits holds {len(sequence.pages)} pages"
    nodes = [node for _, node in prefix.walk()] if prefix else []
    idle = sum(not pool.users(node.page) for node in nodes)
    if pool.idle != idle:
        yield f"{pool.idle} pages are idle, and the prefix cache knows {idle} that nobody uses"
    if twice := [page for page, times in Counter(node.page for node in nodes).items() if times > 1]:
        yield f"pages {twice} are known for several prefixes each"
    for node in nodes:
        above = node.parent.page if node.parent else -1
        if above >= 0 and pool.users(node.page) > pool.users(above):
            yield f"page {node.page} has {pool.users(node.page)} users, and page {above} before it {pool.users(above)}"
