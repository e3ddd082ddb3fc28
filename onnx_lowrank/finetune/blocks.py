"""Blocks of a network: between tensors that all that follows goes through."""

from __future__ import annotations

from onnx_lowrank.graph.plain import PlainGraph


def block_ends(original: PlainGraph, compressed: PlainGraph) -> tuple[str, ...]:
    """Names of tensors in both graphs through which everything passes, one after each part that was changed.

    Between two of them lies at least one node that only the compressed graph has; of several in a row it is the last.
    """
    before = {name for node in original.nodes for name in node.outputs}
    changed = {name for node in compressed.nodes for name in node.outputs} - before
    ends: list[str] = []
    waiting = ""
    touched = False
    passes = _passes(compressed) & _passes(original)
    for node in compressed.nodes:
        if changed & set(node.outputs):
            if waiting and touched:
                ends.append(waiting)
                touched = False
            waiting = ""
            touched = True
        for name in node.outputs:
            if name in passes:
                waiting = name
    if waiting and touched:
        ends.append(waiting)
    return tuple(name for name in ends if name not in compressed.outputs)


def _passes(graph: PlainGraph) -> set[str]:
    """Tensors that are alone alive, beside constants, when they have been made."""
    depends = set(graph.inputs)
    for node in graph.nodes:
        if depends & set(node.inputs):
            depends |= set(node.outputs)
    last: dict[str, int] = {name: len(graph.nodes) for name in graph.outputs}
    for index, node in enumerate(graph.nodes):
        for name in node.inputs:
            last[name] = max(index, last.get(name, -1))
    alive: set[str] = {name for name in graph.inputs if name in last}
    found: set[str] = set()
    for index, node in enumerate(graph.nodes):
        alive |= {name for name in node.outputs if name in depends and last.get(name, -1) > index}
        alive = {name for name in alive if last[name] > index}
        if len(alive) == 1:
            found |= alive & set(node.outputs)
    return found
