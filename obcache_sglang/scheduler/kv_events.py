"""KV events for routers: without virtual tokens, and without what is cached after them."""

from __future__ import annotations

from typing import Any

import msgspec
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from obcache_sglang.host import use
from obcache_sglang.kv.context import FIRST_VIRTUAL_ID


class VisibleEvents:
    """The events of one tree that routers can do something with.

    A block after a hidden one is hidden too, also when it is stored long after: hidden blocks are remembered until they are removed.
    """

    def __init__(self) -> None:
        self._hidden: set[int] = set()

    def of(self, events: list[Any]) -> list[Any]:
        """The visible ones of events that the tree recorded since the last call."""
        shown = []
        for event in events:
            if isinstance(event, BlockStored):
                if event.token_ids[:1] >= [FIRST_VIRTUAL_ID] or event.parent_block_hash in self._hidden:
                    self._hidden.update(event.block_hashes)
                    continue
            elif isinstance(event, BlockRemoved) and self._hidden.intersection(event.block_hashes):
                visible = [block for block in event.block_hashes if block not in self._hidden]
                self._hidden.difference_update(event.block_hashes)
                if not visible:
                    continue
                event = msgspec.structs.replace(event, block_hashes=visible)
            elif isinstance(event, AllBlocksCleared):
                self._hidden.clear()
            shown.append(event)
        return shown


TOUCHES = (
    use("sglang.srt.disaggregation.kv_events.BlockStored", "read", "block_hashes, parent_block_hash, token_ids"),
    use("sglang.srt.disaggregation.kv_events.BlockRemoved", "read", "block_hashes"),
)
