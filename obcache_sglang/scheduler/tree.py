"""SGLang's radix tree, as far as we ask more of it than it offers: looking without touching, what it would evict next, dropping a leaf."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from obcache_sglang.host import use
from obcache_sglang.kv.context import Context, Namespace

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import TreePathNodeInfo
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

MOST_LEAVES = 4096
"""Looked through for those behind a node that goes."""

_FULL = ComponentType.FULL


def radix_key(namespace: Namespace, ids: array[int]) -> RadixKey:
    """Of token ids, real or virtual, in a namespace."""
    return RadixKey(ids, namespace.extra_key, cache_salt=namespace.cache_salt)


def context_key(context: Context, suffix: array[int] | None = None) -> RadixKey:
    """Of a compressed context, or of what is cached after it."""
    return radix_key(context.namespace, context.engine_ids if suffix is None else context.engine_ids + suffix)


def match(tree: UnifiedRadixCache, key: RadixKey) -> tuple[int, int]:
    """(tokens of a prompt that are cached, the deepest node that has any of them, which may go on after them). This does not count as a use."""
    num_tokens, node, _ = tree.tree_core.match_full_device_prefix(key)
    return int(num_tokens), node


def match_exact(tree: UnifiedRadixCache, context: Context) -> tuple[int, int]:
    """`match` of a context's real tokens."""
    return match(tree, radix_key(context.namespace, context.tokens))


def path(tree: UnifiedRadixCache, node: int) -> tuple[TreePathNodeInfo, ...]:
    """The nodes from the first to this one; none where it is gone: ids of nodes are never used again. This does not count as a use."""
    try:
        return tree.tree_core.collect_path_info([node])[0]  # type: ignore[no-any-return]
    except KeyError:
        return ()


def own_tokens(path: Sequence[TreePathNodeInfo]) -> int:
    """Tokens of the last node of a path, and of those before it that are followed by nothing else."""
    start = path[-1].path_start
    for each in reversed(path[:-1]):
        if each.num_children > 1:
            break
        start = each.path_start
    return int(path[-1].path_end - start)


def exact_slots(tree: UnifiedRadixCache, context: Context) -> tuple[int, torch.Tensor] | None:
    """(node, slots [num_tokens] int64) of a context's exact tokens, where all of them are cached. This does not count as a use.

    node: the deepest that has any of them; it may go on after them.
    """
    num_tokens, node = match_exact(tree, context)
    if num_tokens < context.num_tokens:
        return None
    return node, _slots(tree, context, node)[: context.num_tokens]


def exact_beginning(tree: UnifiedRadixCache, context: Context) -> tuple[int, torch.Tensor] | None:
    """(node, slots [num_shared] int64) of the exact tokens that a context shares; the root and no slots where there are none. None where
    the tree has not all of them.
    """
    key = radix_key(context.namespace, context.tokens[: context.num_shared])
    found = tree.match_prefix(MatchPrefixParams(key=key))
    if found.device_prefix_len < context.num_shared:
        return None
    return found.last_device_node, _slots(tree, context, found.last_device_node)


def compressed_slots(tree: UnifiedRadixCache, context: Context) -> tuple[int, torch.Tensor] | None:
    """(node, slots [num_slots] int64) of a resident context. This does not count as a use."""
    if context.node is None:
        return None
    return context.node, _slots(tree, context, context.node)


def _slots(tree: UnifiedRadixCache, context: Context, node: int) -> torch.Tensor:
    """All slots [tokens] int64 from the first node to this one, in a context's namespace."""
    root = tree.root_node_handle(context.namespace.extra_key)
    slots: torch.Tensor = tree.tree_core.collect_full_device_indices(node, root).to(torch.int64)
    return slots


def next_victims(tree: UnifiedRadixCache, most: int) -> Sequence[tuple[TreePathNodeInfo, ...]]:
    """The leaves that the tree would evict next, in order, each with its path. The walk is begun and ended, and evicts nothing."""
    core = tree.tree_core
    core.evict_device_start(_FULL, 1)
    found: list[int] = []
    try:
        while len(found) < most and (node := core.evict_device_next_node(_FULL, {_FULL: 0}).node_id) is not None:
            found.append(node)
    finally:
        core.evict_device_end(_FULL)
    return core.collect_path_info(found) if found else ()


def is_locked(tree: UnifiedRadixCache, node: int) -> bool:
    """Whether a request, or we, hold a node."""
    before = tree.evictable_size()
    lock = tree.lock(node)
    held = bool(tree.evictable_size() == before)  # locking an unlocked node shrinks what is evictable
    tree.unlock(lock)
    return held


def drop_branch(tree: UnifiedRadixCache, node: int) -> None:
    """Evicts a node and what follows it, as far as nobody has it locked."""
    ends: dict[int, int] = {}
    for to_leaf in next_victims(tree, MOST_LEAVES):
        ids = [each.node_id for each in to_leaf]
        if node in ids:
            ends |= {each.node_id: each.path_end for each in to_leaf[ids.index(node) + 1 :]}
    # From the ends on: a node goes when everything behind it has gone.
    for behind in sorted(ends, key=ends.__getitem__, reverse=True):
        drop_leaf(tree, behind)
    drop_leaf(tree, node)


def drop_leaf(tree: UnifiedRadixCache, node: int) -> bool:
    """Evicts a node, if it is a leaf that nobody has locked (the Rust core panics on a node with children). Whether it was."""
    known = path(tree, node)
    if not known or known[-1].num_children:
        return False
    return not is_locked(tree, node) and bool(tree._drop_subtree_no_host(node, {_FULL: 0}))


def drop_ends(tree: UnifiedRadixCache, context: Context, suffixes: Sequence[array[int]]) -> list[array[int]]:
    """Evicts the paths of suffixes of a compressed context, of all that are in the tree, up to the context; an empty one is its own node.

    Returns those of which a part is left. The tree can drop unlocked leaves only, and cannot list a node's children: so the deepest end
    of all suffixes goes first, which must be a leaf, or locked, as is then every node that it has in common with others.
    """
    left = []
    # Of each suffix, minus the depth at which it ends at the latest.
    heap = [(-(context.num_slots + len(suffix)), index) for index, suffix in enumerate(suffixes)]
    heapq.heapify(heap)
    while heap:
        bound, index = heapq.heappop(heap)
        found = tree.match_prefix(MatchPrefixParams(key=context_key(context, suffixes[index])))
        depth = found.device_prefix_len
        if depth < context.num_slots:
            return []  # the context's node itself is gone, and with it everything after it
        if depth == context.num_slots and suffixes[index]:
            continue  # nothing of this suffix is left
        if -depth != bound:
            heapq.heappush(heap, (-depth, index))
        elif not drop_leaf(tree, found.last_device_node):
            left.append(suffixes[index])
        elif depth > context.num_slots:
            heapq.heappush(heap, (1 - depth, index))  # what is left of this suffix ends before
    return left


_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_CORE = "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface"

TOUCHES = (
    use(f"{_TREE}.match_prefix", "call", "what of a context and its suffixes is in the tree", ("params",)),
    use(f"{_TREE}.root_node_handle", "call", "where a path in the tree begins", ("extra_key",)),
    use(f"{_TREE}.lock", "call", "holds a node while it is made, read or pinned", ("node_id",)),
    use(f"{_TREE}.unlock", "call", "lets it be evicted", ("lock",)),
    use(f"{_TREE}.evictable_size", "call", "whether a node is locked by a request"),
    use(f"{_TREE}._drop_subtree_no_host", "call", "frees a context's slots", ("node_id", "tracker")),
    use(
        f"{_CORE}.collect_path_info",
        "call",
        "whether a context's node is still there, without using it; ids of nodes are never used again",
        ("end_node_ids",),
    ),
    use(f"{_CORE}.collect_full_device_indices", "call", "the slots of a context's exact KV", ("from_node_id", "until_node_id")),
    use(f"{_CORE}.match_full_device_prefix", "call", "what of a prompt is cached, without using it", ("key",)),
    use(f"{_CORE}.evict_device_start", "call", "what would be evicted next", ("component_type", "request_cnt")),
    use(f"{_CORE}.evict_device_next_node", "call", "what would be evicted next", ("component_type", "tracker")),
    use(f"{_CORE}.evict_device_end", "call", "what would be evicted next", ("component_type",)),
)
