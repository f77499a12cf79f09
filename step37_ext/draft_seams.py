"""The SGLang names that speculative decoding uses, in the form of `seams.py`."""

from dataclasses import replace

from step37_ext.seam import Seam, attributes

SRT = "sglang.srt"
SPECULATIVE = f"{SRT}.speculative"
KERNELS = "sglang.kernels.ops.speculative"
LINEAR = f"{SRT}.layers.linear"
BACKEND = f"{SRT}.layers.attention.base_attn_backend.AttentionBackend"
VERIFY_MASK = f"{SRT}.layers.attention.verify_mask.VerifyMask"
PLATFORM = f"{SRT}.platforms.interface.SRTPlatform"

_EVERYWHERE = (
    Seam(
        f"{SPECULATIVE}.draft_utils.DraftBackendFactory.create_draft_extend_backend",
        "SGLang's list of attention backends for drafts is closed",
        takes=(),
    ),
    Seam(
        f"{SRT}.models.step3p5_mtp.Step3p5MTP",
        "the draft model, whose place ours takes",
        takes=("config", "quant_config", "draft_model_idx", "prefix"),
    ),
    Seam(
        f"{SRT}.models.step3p5_mtp.Step3p5MTP.set_embed_and_head",
        "gives drafts the main model's embedding",
        takes=("embed", "head"),
    ),
    Seam(
        f"{SRT}.models.step3p5_mtp.Step3p5MTP.forward",
        "a draft step",
        takes=("input_ids", "positions", "forward_batch"),
    ),
    Seam(
        f"{LINEAR}.ReplicatedLinear",
        "a draft's joining projection",
        call=("input_size", "output_size", "bias=", "prefix="),
    ),
    *attributes(
        f"{SRT}.model_executor.forward_batch_info.ForwardMode",
        "tells drafts from prompts",
        "is_target_verify",
        "is_draft_extend_v2",
    ),
    *attributes(
        f"{SPECULATIVE}.eagle_info.EagleVerifyInput", "the number of drafts", "draft_token_num"
    ),
    *attributes(
        f"{SPECULATIVE}.eagle_info.EagleDraftExtendInput",
        "what a draft step continues",
        "hidden_states",
        "num_tokens_per_req",
    ),
    Seam(f"{BACKEND}.verify_mask", "drafts need no mask"),
    Seam(
        f"{BACKEND}.update_verify_buffers_to_fill_after_draft",
        "nothing depends on the drafts",
        takes=("spec_info", "cuda_graph_bs"),
    ),
    *attributes(
        VERIFY_MASK,
        "a mask that is never read",
        "buffer",
        "mode",
        "max_bs",
        "is_read",
    ),
    Seam(f"{SPECULATIVE}.eagle_utils.TreeMaskMode.QLEN_ONLY", "the smallest mask"),
)

_ON_A_CPU = (
    Seam(
        f"{PLATFORM}.supports_speculative_algorithm",
        "on a CPU the MTP layers draft",
        takes=("algorithm",),
    ),
    Seam(
        f"{PLATFORM}.get_speculative_worker_cls",
        "where a CPU gets the operations that it lacks",
        takes=("algorithm",),
    ),
    Seam(f"{PLATFORM}.get_speculative_cache_locs_fn", "one of them", takes=()),
    Seam(f"{KERNELS}.spec_tree.TreeMaskMode.QLEN_ONLY", "the layout of a mask"),
    Seam(
        f"{KERNELS}.spec_tree.build_tree_kernel_efficient_func",
        "lacking on a CPU",
        takes=(
            "parent_list",
            "top_scores_index",
            "seq_lens",
            "tree_mask",
            "positions",
            "retrieve_index",
            "retrieve_next_token",
            "retrieve_next_sibling",
            "topk",
            "spec_steps",
            "num_verify_tokens",
            "tree_mask_mode",
        ),
    ),
    Seam(
        f"{KERNELS}.spec_tree.verify_tree_greedy_func",
        "lacking on a CPU",
        takes=(
            "predicts",
            "accept_index",
            "accept_token_num",
            "candidates",
            "retrieve_index",
            "retrieve_next_token",
            "retrieve_next_sibling",
            "target_predict",
            "topk",
        ),
    ),
    Seam(
        f"{KERNELS}.cache_locs.assign_draft_cache_locs_contiguous_func",
        "lacking on a CPU",
        takes=(
            "req_pool_indices",
            "req_to_token",
            "seq_lens",
            "out_cache_loc",
            "topk",
            "num_cols",
            "positions",
            "mrope",
        ),
    ),
    Seam(
        f"{KERNELS}.eagle.fill_bonus_tokens_func",
        "lacking on a CPU",
        takes=("accept_tokens", "accept_lens", "bonus_tokens", "accept_stride", "batch_size"),
    ),
    Seam(
        f"{KERNELS}.multi_layer_eagle.rotate_input_ids",
        "lacking on a CPU",
        takes=(
            "input_ids",
            "extend_start_loc",
            "extend_seq_lens",
            "topk_index",
            "select_index",
        ),
    ),
    Seam(
        f"{SRT}.mem_cache.allocation.assign_req_to_token_pool_func",
        "lacking on a CPU",
        takes=(
            "req_pool_indices",
            "req_to_token",
            "start_offset",
            "end_offset",
            "out_cache_loc",
            "batch_size",
        ),
    ),
    Seam(
        f"{SRT}.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup",
        "prepares a kernel that there is not on a CPU",
        takes=(),
    ),
    *attributes(
        f"{SPECULATIVE}.eagle_utils",
        "None on a CPU",
        "top_k_renorm_prob",
        "top_p_renorm_prob",
        "tree_speculative_sampling_target_only",
    ),
)

DRAFTS = _EVERYWHERE + tuple(replace(seam, since="0.5.23") for seam in _ON_A_CPU)
