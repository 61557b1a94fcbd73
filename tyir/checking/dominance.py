"""Which block dominates which in a region: every path from the entry to the one passes through the other."""

from __future__ import annotations

import networkx as nx

from tyir.ir import Block, Region

__all__ = ["DominanceTree"]


class DominanceTree:
    """Dominance in one region, by networkx' algorithm (Cooper, Harvey, Kennedy: A Simple, Fast Dominance
    Algorithm).
    """

    def __init__(self, region: Region) -> None:
        graph = nx.DiGraph()
        graph.add_nodes_from(region.blocks)
        for block in region.blocks:
            if block.last_op is not None:
                graph.add_edges_from((block, successor) for successor in block.last_op.successors)
        self._entry = region.entry
        self._parents: dict[Block, Block | None] = dict(nx.immediate_dominators(graph, region.entry))

    def dominates(self, above: Block, below: Block) -> bool:
        """Whether `above` dominates `below` (a block dominates itself); everything dominates an unreachable
        block.
        """
        if below not in self._parents:
            return True
        current: Block | None = below
        while current is not None:
            if current is above:
                return True
            parent = self._parents.get(current)
            current = None if parent is current or current is self._entry else parent
        return False

    def strict_dominators(self, block: Block) -> list[Block]:
        """The blocks that dominate a reachable block, nearest first, without itself."""
        found: list[Block] = []
        while block is not self._entry:
            parent = self._parents.get(block)
            if parent is None:
                break
            found.append(parent)
            block = parent
        return found

    def preorder(self) -> list[Block]:
        """The reachable blocks, dominators before what they dominate."""
        children: dict[Block, list[Block]] = {}
        for block, parent in self._parents.items():
            if parent is not None and block is not self._entry:
                children.setdefault(parent, []).append(block)
        order: list[Block] = []
        stack = [self._entry]
        while stack:
            block = stack.pop()
            order.append(block)
            stack.extend(children.get(block, ()))
        return order
