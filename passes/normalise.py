"""Make in-place operations functional where they would overwrite what crosses a boundary, and bring what is made of
weights alone to where it is used.

Inside one block in-place operations stay as the model wrote them: they save memory, and autograd itself checks that
they are legal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import fx

from bpfx.passes import adapters
from bpfx.passes.alias import Aliases, analyse, written
from bpfx.passes.dead_code import remove_dead_code
from bpfx.passes.graph import ModelGraph
from bpfx.passes.opaque import draws


def tidy(graph: ModelGraph, mutated: set[str]) -> None:
    """What is done to every captured graph before it is verified, in place.

    Args:
        graph: changed in place.
        mutated: names of the buffers that a step changes.
    """
    remove_dead_code(graph, mutated)
    sink_weight_code(graph, mutated)
    adapters.guard_group_norms(graph.graph)
    for node, dim in graph.batch_dims.items():
        node.meta["batch_dim"] = dim


def sink_weight_code(graph: ModelGraph, mutated: set[str]) -> None:
    """Move what depends on weights and on no input right in front of its first use.

    A model may transform its weights long before it uses them. A cut in between would hand them to another block than
    the one that uses them, and no local loss would reach them.

    Args:
        graph: changed in place.
        mutated: names of the buffers that a step changes; what reads them stays where it is.
    """
    aliases = analyse(graph.graph)
    made: set[fx.Node] = set()  # of weights alone
    for node in graph.graph.nodes:
        if node in graph.weight_of:
            if graph.weight_of[node] not in mutated:
                made.add(node)
        elif (
            isinstance(node.target, torch._ops.OpOverload)
            and node.all_input_nodes
            and made.issuperset(node.all_input_nodes)
            and aliases.root[node] not in aliases.mutations
            and not node.is_impure()
            and not draws(node, graph.root)
        ):
            made.add(node)
    for node in reversed(graph.compute_nodes()):
        if node in made and node.users:
            first = min(node.users)
            if first.op != "output":
                first.prepend(node)


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
            # A second write is recorded as one on the result of the first.
            writes = [m.node for m in aliases.mutations.get(placeholder, ())]
            after = [n for n in aliases.groups[placeholder] if n.target is written]
            touching = (*placeholder.users, *writes, *after, *(u for n in after for u in n.users))
            writers.setdefault(name, []).extend(order[u] for u in touching if u in order)
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
        if not all(m.simple for m in mutations):
            continue  # written through views, too: all of it is in one block, which copies the inputs it writes to
        group = aliases.groups[root]
        seen = {block_of.get(n, -1) for member in group for n in (member, *member.users) if n.op != "output"}
        if len(seen) == 1 and not any(user.op == "output" for member in group for user in member.users):
            continue
        for mutation in mutations:
            if mutation.functional is None:
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
