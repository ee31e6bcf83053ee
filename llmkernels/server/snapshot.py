"""What an engine does right now, as plain data for whoever draws it.  No text and no token of a request is in it.

A snapshot is taken between two steps and costs nothing before it is asked for.
"""

from itertools import islice
from typing import Any

from llmkernels.engine.scheduler import Scheduler
from llmkernels.engine.sequence import Sequence

MOST_CELLS, MOST_NODES, MOST_REQUESTS = 4096, 4096, 256  # to draw, and to hold the engine up for


def snapshot(scheduler: Scheduler) -> dict[str, Any]:
    """{page_size, pages, per_cell, cells, requests, tree, tree_pages}.

    cells: a number for each `per_cell` pages: how many use the one used most; -1: nobody, keys are kept; 0: empty.
    requests: {state, prompt, computed, written, limit, cached, preempted}, in tokens, oldest first; state is 'runs' or
        'waits', and there are MOST_REQUESTS at most.
    tree: the prefix cache's pages in runs without a branch, [number of the run before it, pages, users]; -1: none.
    """
    pool = scheduler.pool
    idle = {node.page for _, node in scheduler.prefix.walk()} if scheduler.prefix and pool.idle else set()
    per_cell = -(-pool.pages // MOST_CELLS)
    cells = []
    for start in range(0, pool.pages, per_cell):
        some = range(start, min(start + per_cell, pool.pages))
        most = max(map(pool.users, some))
        cells.append(most or (-1 if any(page in idle for page in some) else 0))
    requests = [_request(q, "runs") for q in scheduler.running] + [_request(q, "waits") for q in scheduler.waiting]
    return {
        "page_size": scheduler.page_size,
        "pages": pool.pages,
        "per_cell": per_cell,
        "cells": cells,
        "requests": requests[:MOST_REQUESTS],
        "tree": _runs(scheduler),
        "tree_pages": scheduler.prefix.pages if scheduler.prefix else 0,
    }


def _request(sequence: Sequence, state: str) -> dict[str, Any]:
    return {
        "state": state,
        "prompt": sequence.prompt_length,
        "computed": sequence.computed,
        "written": len(sequence.tokens) - sequence.prompt_length,
        "limit": sequence.limit - sequence.prompt_length,
        "cached": sequence.cached or 0,
        "preempted": state == "waits" and sequence.cached is not None,
    }


def _runs(scheduler: Scheduler) -> list[list[int]]:
    """The tree's edges, those without a branch between them joined where as many sequences use them."""
    runs: list[list[int]] = []
    at: dict[int, int] = {}  # page -> its run
    if not scheduler.prefix:
        return runs
    for depth, node in islice(scheduler.prefix.walk(), MOST_NODES):
        users, parent = scheduler.pool.users(node.page), node.parent
        before = at[parent.page] if depth and parent else -1
        if before >= 0 and parent and len(parent.children) == 1 and runs[before][2] == users:
            runs[before][1] += 1
            at[node.page] = before
        else:
            at[node.page] = len(runs)
            runs.append([before, 1, users])
    return runs
