"""Which block dominates which in a region: every path from the entry to the one passes through the other."""

from __future__ import annotations

from tyir.ir import Block, Region

__all__ = ["DominanceTree", "unreachable_blocks"]


def unreachable_blocks(region: Region) -> list[Block]:
    """The blocks that no path from the entry reaches."""
    if len(region.blocks) <= 1:
        return []
    reached = {region.entry}
    waiting = [region.entry]
    while waiting:
        for op in waiting.pop():
            for successor in op.successors:
                if successor not in reached:
                    reached.add(successor)
                    waiting.append(successor)
    return [block for block in region.blocks if block not in reached]


class DominanceTree:
    """Dominance in one region, by networkx' algorithm (Cooper, Harvey, Kennedy: A Simple, Fast Dominance
    Algorithm).
    """

    def __init__(self, region: Region) -> None:
        import networkx as nx  # a tenth of a second, which modules whose functions are one block do without

        graph = nx.DiGraph()
        graph.add_nodes_from(region.blocks)
        for block in region.blocks:
            if block.last_op is not None:
                graph.add_edges_from((block, successor) for successor in block.last_op.successors)
        self._entry = region.entry
        self._parents: dict[Block, Block | None] = dict(nx.immediate_dominators(graph, region.entry))
        self._parents[region.entry] = None  # networkx before 3.6 says itself, since then nothing

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
            current = self._parents.get(current)
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
