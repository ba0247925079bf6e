"""SGLang's radix tree, as far as we ask more of it than it offers: looking without touching, what it would evict next, dropping a leaf.

With SGLang's HiCache (`--enable-hierarchical-cache`) a node may have a copy in host memory, beside its slots or alone.
"""

from __future__ import annotations

import heapq
import logging
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from obcache_sglang.host import use
from obcache_sglang.kv.context import Context, Namespace

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import TreePathNodeInfo
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

logger = logging.getLogger(__name__)

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


def has_host_tier(tree: UnifiedRadixCache) -> bool:
    """Whether nodes can be copied to host memory."""
    return tree.cache_controller is not None


def place(tree: UnifiedRadixCache, context: Context) -> Literal["device", "host"] | None:
    """Where the content of a context's node lies: in its slots, else in host memory alone; None where it is gone."""
    known = path(tree, context.node) if context.node is not None else ()
    if not known or known[-1].path_end != context.num_slots:
        return None
    if known[-1].full_value_len == context.own_slots:
        return "device"
    if not has_host_tier(tree) or context.own_slots < tree.load_back_threshold:
        return None  # HiCache does not bring back what is shorter
    on_host = known[-1].full_value_len is None and tree.is_backuped(known[-1].node_id)
    return "host" if on_host else None


def copy_to_host(tree: UnifiedRadixCache, node: int | None) -> None:
    """Where SGLang's policy copies every node to host memory as soon as it is made, does so with one whose content has come only now."""
    if node is None or not has_host_tier(tree) or tree.is_write_back or tree.write_through_threshold > 1:
        return
    try:
        tree._execute_and_commit_kv_backup(tree.tree_core.build_backup_kv_action(node))
    except Exception:  # the context is complete without a copy
        logger.exception("obcache: a context could not be copied to host memory")


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
    """Frees the slots of a node, if it is a leaf that nobody has locked (the Rust core panics on others). Whether it was.

    A copy in host memory stays until SGLang needs its room. It opens nothing: what is dropped is not matched again, or is ordinary text.
    """
    if not _is_free_leaf(tree, node):
        return False
    if has_host_tier(tree) and tree.is_backuped(node):
        tree._evict_device_leaf(node, {_FULL: 0})
        return True
    return bool(tree._drop_subtree_no_host(node, {_FULL: 0}))


def evict_leaf(tree: UnifiedRadixCache, node: int) -> bool:
    """As `drop_leaf`, but as the tree evicts: to host memory, where SGLang's policy has it copied there by then. Whether it was free."""
    if not has_host_tier(tree):
        return drop_leaf(tree, node)
    if not _is_free_leaf(tree, node):
        return False
    backup = tree._evict_device_leaf(node, {_FULL: 0})
    if backup is None:
        return True
    if tree._execute_and_commit_kv_backup(backup, write_back=True) == 0:
        return bool(tree._drop_subtree_no_host(node, {_FULL: 0}))  # host memory has no room
    tree.writing_check(write_back=True)
    tree._demote(node, {_FULL: 0})
    return True


def _is_free_leaf(tree: UnifiedRadixCache, node: int) -> bool:
    """Whether a node has slots, nothing behind it has, and nobody has it locked."""
    known = path(tree, node)
    if not known or known[-1].full_value_len is None or is_locked(tree, node):
        return False
    if not known[-1].num_children:
        return True
    # What is behind it may lie in host memory alone.
    return has_host_tier(tree) and any(to_leaf[-1].node_id == node for to_leaf in next_victims(tree, MOST_LEAVES))


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
    use(_TREE, "read", "cache_controller: not None with HiCache; load_back_threshold: slots, of what it brings back at least"),
    use(f"{_TREE}.is_backuped", "call", "whether a node has a copy in host memory", ("node_id",)),
    use(f"{_TREE}.is_write_back", "read", "whether nodes are copied to host memory when they are evicted, and not before"),
    use(f"{_TREE}.write_through_threshold", "read", "after how many uses they are copied otherwise"),
    use(f"{_TREE}._evict_device_leaf", "call", "frees the slots of a node with a copy in host memory", ("node_id", "tracker")),
    use(f"{_TREE}._execute_and_commit_kv_backup", "call", "copies a node to host memory", ("action", "write_back")),
    use(f"{_TREE}.writing_check", "call", "waits for that copy", ("write_back",)),
    use(f"{_TREE}._demote", "call", "frees the slots of a node that was copied", ("node_id", "tracker")),
    use(f"{_CORE}.build_backup_kv_action", "call", "what is copied to host memory with a node", ("node_id",)),
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
