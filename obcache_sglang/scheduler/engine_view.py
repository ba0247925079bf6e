"""What we read and change of SGLang's scheduler, in one place: the seam at which decisions are tested without an engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.utils import prepare_abort
from sglang.srt.mem_cache import common

from obcache_sglang.host import use
from obcache_sglang.kv.cells import KVSpace

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache


MOST_LOADS = 2
"""With so many copies from host memory under way, none of ours begins: HiCache has three places for them, and asserts that its next one is free."""


class EngineView:
    """One scheduler.

    running_batch: of the pass under way, None outside of one: SGLang's own attribute is that of the pass before.
    late: requests that came into the queue during the pass under way, and wait for the next one; None outside of one.
    on_cpu: whether the model computes on the CPU. kv_space: of the KV pool; None where it is not one space. num_kv_heads: of a layer, on this rank. pool_slots: KV slots in all. context_len: the model's longest prompt.
    most_prefill_tokens: that one forward reads of prompts.
    prompt_limit: tokens from which on SGLang refuses a prompt, since model or pool cannot hold it. truncates_prompts: whether it cuts it instead.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.running_batch: ScheduleBatch | None = None
        self.late: list[Req] | None = None
        self.tree: UnifiedRadixCache = scheduler.tree_cache
        self.on_cpu = scheduler.device == "cpu"
        kv_pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        self.kv_space = KVSpace.of(kv_pool)
        self.num_kv_heads: int = kv_pool.head_num
        self.pool_slots: int = scheduler.max_total_num_tokens
        self.context_len: int = scheduler.model_config.context_len
        self.most_prefill_tokens: int = min(scheduler.chunked_prefill_size or self.pool_slots, self.pool_slots)
        self.prompt_limit: int = scheduler.max_req_input_len
        self.truncates_prompts = bool(scheduler.server_args.allow_auto_truncate)
        self.tokenizer: Any = scheduler.tokenizer

    @property
    def queue(self) -> list[Req]:
        """Requests that wait for their prefill."""
        queue: list[Req] = self._scheduler.waiting_queue
        return queue

    @queue.setter
    def queue(self, queue: list[Req]) -> None:
        self._scheduler.waiting_queue = queue

    def free_slots(self) -> int:
        """KV slots that nothing holds."""
        return int(self.tree.token_to_kv_pool_allocator.available_size())

    def waiting(self) -> Iterator[Req]:
        """Requests that wait: in the queue, for the next pass, and for their grammar."""
        yield from self.queue
        yield from self.late or ()
        yield from self._scheduler.grammar_manager.grammar_queue

    def in_flight(self) -> set[Req]:
        """Requests that hold KV: those of the batches under way, and one between two chunks of its prefill."""
        running = self.running_batch.reqs if self.running_batch is not None else ()
        chunked = self.chunked_req
        return {*self._scheduler.collect_inflight_reqs(), *running, *((chunked,) if chunked is not None else ())}

    @property
    def runs_something(self) -> bool:
        """Whether a request decodes, or is between two chunks of its prefill. Only within a pass."""
        decodes = self.running_batch is not None and not self.running_batch.is_empty()
        return decodes or self.chunked_req is not None

    def admits_nobody(self) -> bool:
        """Whether SGLang will not look at the queue in the pass under way."""
        running = self.running_batch
        assert running is not None
        full = running.batch_is_full and not running.is_empty() and not self._scheduler.enable_priority_preemption
        return bool(full and self.chunked_req is None)

    @property
    def chunked_req(self) -> Req | None:
        """The request between two chunks of its prefill."""
        return self._scheduler.chunked_req

    @property
    def chunk_rest(self) -> int:
        """Tokens that the request between two chunks of its prefill has still to read. SGLang has admitted all of them, reads the next chunk whatever
        is free, and ends the process where it finds no slot: nobody else may take theirs."""
        req = self.chunked_req
        return 0 if req is None else max(0, len(req.origin_input_ids) + len(req.output_ids) - req.kv.kv_committed_len)

    @property
    def must_become_idle(self) -> bool:
        """Whether somebody waits for the engine to become idle (flush, weight update)."""
        return self._scheduler.flush_wrapper._pending is not None

    @property
    def eos_token_ids(self) -> Any:
        """Of the model."""
        return self._scheduler.model_config.hf_eos_token_id

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return int(self._scheduler.model_config.vocab_size)

    @property
    def lowest_priority(self) -> int | None:
        """Of a request that all others go before; None where requests have no priorities."""
        if not self._scheduler.enable_priority_scheduling:
            return None
        return sys.maxsize if self._scheduler.schedule_low_priority_values_first else -sys.maxsize - 1

    def answer(self, req: Req) -> None:
        """Sends a finished request's answer to its client."""
        self._scheduler.output_streamer.stream_output([req], req.return_logprob)

    def abort_after_chunk(self, req: Req) -> None:
        """Ends the request between two chunks of its prefill when its chunk has run."""
        self._scheduler._pending_chunked_abort_req = req

    def finish_forwards(self) -> None:
        """Takes the results of the forwards under way, as pause_generation does."""
        scheduler = self._scheduler
        while scheduler.enable_overlap and scheduler.result_queue:
            scheduler.process_batch_result(*scheduler.result_queue.popleft())

    def end_chunked(self, message: str) -> None:
        """Aborts the request between two chunks of its prefill, at once. After `finish_forwards`."""
        req = self._scheduler.chunked_req
        prepare_abort(req, message)
        # Through the module, where our own hook sits.
        common.release_kv_cache(req, self._scheduler.tree_cache, checkpoint=False)
        self._scheduler.chunked_req = None

    def wait_for_forwards(self) -> None:
        """What is computed from now on starts on the device when the forward under way has ended, whose stray last writes may be to
        slots that are free by now. Nothing waits on the host; SGLang's next forward waits for what is computed here."""
        scheduler = self._scheduler
        if not self.on_cpu:
            scheduler.device_module.current_stream().wait_stream(scheduler.forward_stream)
        self.wait_for_loads()

    def wait_for_loads(self) -> None:
        """Likewise when all that the tree has, and HiCache is bringing back from host memory, is in its slots.

        SGLang's batches wait for what they read themselves. It may have queued a copy for a request that it has not admitted then: that begins now.
        """
        controller = self.tree.cache_controller
        if controller is None or not self.tree.ongoing_load_back:
            return
        acks = controller.ack_load_queue
        if controller.load_queue:
            if len(acks) >= MOST_LOADS:
                self.finish_loads()
            self.tree.ready_to_load_host_cache()
        if not self.on_cpu:
            stream = self._scheduler.device_module.current_stream()
            for ack in acks:
                stream.wait_event(ack.finish_event)

    def finish_loads(self) -> None:
        """Waits on the host for all that is being copied from host memory: what it is copied to may be somebody else's afterwards."""
        if self.tree.cache_controller is not None:
            for ack in self.tree.cache_controller.ack_load_queue:
                ack.finish_event.synchronize()

    def keep_a_load_place(self) -> None:
        """Lets SGLang begin a copy from host memory with the next batch, as it will without looking whether one of HiCache's places is free."""
        controller = self.tree.cache_controller
        if controller is not None and not self.tree.has_free_load_back_slot():
            controller.ack_load_queue[0].finish_event.synchronize()

    def may_load(self) -> bool:
        """Whether one more copy from host memory can begin, beside those that SGLang begins in the same pass. The same on all ranks."""
        controller = self.tree.cache_controller
        return controller is not None and len(controller.ack_load_queue) < MOST_LOADS

    def forget_last_batch(self) -> None:
        """Nothing of it runs any more."""
        self._scheduler.last_batch = None

    def evict(self, num_slots: int) -> None:
        """Lets the tree evict until so many slots are free, as before an allocation."""
        common.evict_from_tree_cache(self.tree, num_slots)


_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"

TOUCHES = (
    use(f"{_SCHEDULER}.collect_inflight_reqs", "call", "the readers of a context"),
    use(
        _SCHEDULER,
        "read",
        "device, device_module, forward_stream: what copies between two forwards waits for the first; chunked_prefill_size; "
        "enable_priority_scheduling, schedule_low_priority_values_first: calibration goes last",
    ),
    use(
        f"{_SCHEDULER}.init_req_max_new_tokens",
        "read",
        "a prompt's length is looked at when it arrives, against max_req_input_len",
    ),
    use(
        f"{_TREE}.ready_to_load_host_cache",
        "call",
        "begins to copy from host memory. Of the tree: ongoing_load_back, nodes that are coming back; cache_controller.ack_load_queue, the copies "
        "under way, each with its finish_event; cache_controller.load_queue, what is to be copied with the next batch",
    ),
    use(f"{_TREE}.has_free_load_back_slot", "call", "whether one more copy can begin"),
    use(f"{_SCHEDULER}.process_batch_result", "call", "takes the result of a forward before a flush"),
    use(
        "sglang.srt.managers.scheduler_components.flush_wrapper.SchedulerFlushWrapper",
        "read",
        "_pending: somebody waits for the engine to become idle",
    ),
    use(
        "sglang.srt.disaggregation.utils.prepare_abort",
        "call",
        "ends a job that makes way",
        ("req", "error_message"),
    ),
    use(
        "sglang.srt.mem_cache.common.evict_from_tree_cache",
        "call",
        "room for a context's slots",
        ("tree_cache", "num_tokens"),
    ),
)
