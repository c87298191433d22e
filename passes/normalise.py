"""Make in-place operations functional where they would overwrite what crosses a boundary.

Inside one block they stay as the model wrote them: they save memory, and autograd itself checks that they are legal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import fx

from bpfx.passes.alias import Aliases, analyse
from bpfx.passes.graph import ModelGraph


def barred_cuts(graph: ModelGraph, order: Mapping[fx.Node, int], mutated: set[str]) -> list[tuple[int, int]]:
    """Ranges of positions that no cut may fall into.

    Memory written through views must stay in one block, and so must a buffer that is written: two blocks would write it
    in another order in the reverse sweep.

    Returns pairs ``(first, last)``: a cut after position p is barred when ``first <= p < last``.
    """
    aliases = analyse(graph.graph)
    writers: dict[str, list[int]] = {}
    for placeholder, name in graph.weight_of.items():
        if name in mutated:
            writers.setdefault(name, []).extend(order[u] for u in placeholder.users if u in order)
    barred = [(min(p), max(p)) for p in writers.values() if p]
    for root, mutations in aliases.mutations.items():
        if root in graph.weight_of or all(m.simple for m in mutations):
            continue
        touched = [order[n] for member in aliases.groups[root] for n in (member, *member.users) if n in order]
        barred.append((min(touched), max(touched)))
    return barred


def make_functional(graph: ModelGraph, block_of: Mapping[fx.Node, int]) -> list[str]:
    """Replace in-place operations whose memory is seen by more than one block; return the replaced nodes' names.

    Args:
        graph: changed in place.
        block_of: the block of every compute node; inputs belong to none.
    """
    aliases: Aliases = analyse(graph.graph)
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    replaced = []
    for root, mutations in aliases.mutations.items():
        if root in graph.weight_of:
            continue  # a buffer: programs hand in the one that may be written
        group = aliases.groups[root]
        seen = {block_of.get(n, -1) for member in group for n in (member, *member.users) if n.op != "output"}
        if len(seen) == 1 and not any(user.op == "output" for member in group for user in member.users):
            continue
        for mutation in mutations:
            if not mutation.simple or mutation.functional is None:
                continue
            node = mutation.node
            node.target = mutation.functional
            for member in group:
                if member is node or order[member] > order[node]:
                    continue
                for user in list(member.users):
                    if order[user] > order[node]:
                        user.replace_input_with(member, node)
            replaced.append(node.name)
    return replaced


@contextmanager
def undone(graph: ModelGraph) -> Iterator[None]:
    """Put the graph's nodes back as they were: a partition that is only tried leaves no trace."""
    before = [(n, n.target, n.args, n.kwargs) for n in graph.graph.nodes]
    try:
        yield
    finally:
        for node, target, args, kwargs in before:
            node.target, node.args, node.kwargs = target, args, kwargs
