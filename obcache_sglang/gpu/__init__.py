"""Kernels and attention on GPUs. No import of kernels here: not every machine can."""

from obcache_sglang.host import use

_POOL = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool"
_DECODE_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"

TOUCHES = (
    use(_DECODE_GRAPHS, "call", "captures our decode graphs", ("model_runner", "attn_backend")),
    use(
        "sglang.srt.layers.attention.base_attn_backend.AttentionBackend",
        "subclass",
        "the attention in them: init_cuda_graph_state, get_cuda_graph_seq_len_fill_value, shared_read_ends, "
        "init_forward_metadata_in_graph, forward_decode",
    ),
    use(
        "sglang.srt.layers.attention.base_attn_backend.SharedReadEnds.POST_REPLAY", "read", "they read the page table to the end"
    ),
    use(
        f"{_POOL}.set_kv_buffer",
        "call",
        "new K and V, where our attention is the only one",
        ("layer", "loc_info", "cache_k", "cache_v"),
    ),
    use("sglang.srt.mem_cache.memory_pool.KVWriteLoc", "call", "where new K and V go", ("loc", "swa_loc")),
    use(
        "sglang.kernels.ops.attention.decode_attention.decode_attention_fwd",
        "call",
        "decode over per-head budgets on GPUs",
        (
            "q",
            "k_buffer",
            "v_buffer",
            "o",
            "kv_indptr",
            "kv_indices",
            "attn_logits",
            "attn_lse",
            "num_kv_splits",
            "max_kv_splits",
        ),
    ),
    use(
        "sglang.kernels.ops.attention.extend_attention.extend_attention_fwd_unified",
        "call",
        "prefill over per-head budgets on GPUs",
        ("q", "o", "k_buffer", "v_buffer", "k_scale", "v_scale", "qo_indptr", "kv_indptr", "kv_indices", "prefix_lens"),
    ),
    use(
        "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend",
        "read",
        "the log-sum-exps of prefill_wrapper_ragged and forward_metadata.prefill_wrappers",
    ),
)
