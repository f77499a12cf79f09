"""Every SGLang name that this package uses, with the use that is made of it.

`step37_ext/compat.py` checks the list against SGLang's source, version by version, and a test sees
that every import of SGLang in the package is on it.
"""

from step37_ext.draft_seams import DRAFTS
from step37_ext.seam import Seam, attributes

SRT = "sglang.srt"
LAYERS = f"{SRT}.layers"
LINEAR = f"{LAYERS}.linear"
EMBEDDING = f"{LAYERS}.vocab_parallel_embedding"
BACKEND = f"{LAYERS}.attention.base_attn_backend.AttentionBackend"
QUANTIZATION = f"{LAYERS}.quantization.base_config"
PLATFORM = f"{SRT}.platforms.interface.SRTPlatform"
BATCH = f"{SRT}.model_executor.forward_batch_info.ForwardBatch"
MULTIMODAL = f"{SRT}.models.step3p7.Step3p7ForConditionalGeneration"

REGISTRATION = (
    Seam(
        f"{SRT}.plugins.hook_registry.HookRegistry.register",
        "places a hook",
        call=("target", "hook", "hook_type"),
    ),
    Seam(f"{SRT}.plugins.hook_registry.HookRegistry.apply_hooks", "wraps the targets", call=()),
    Seam(f"{SRT}.plugins.hook_registry.HookType.AROUND", "the kind of hook placed"),
    Seam(
        f"{SRT}.arg_groups.resolution_hooks.register_resolution_hook",
        "checks a start, and defaults its backends, while its arguments are resolved",
        call=("name",),
    ),
    Seam(
        f"{SRT}.arg_groups.overrides.declare_resolution",
        "sets a default among the server's arguments",
        call=(
            "server_args",
            "source",
            "attention_backend=",
            "device=",
            "disable_cuda_graph=",
            "disable_flashinfer_autotune=",
            "disable_prefill_cuda_graph=",
            "enable_multi_layer_eagle=",
            "max_running_requests=",
            "moe_runner_backend=",
            "model_loader_extra_config=",
        ),
    ),
    Seam(
        f"{SRT}.arg_groups.overrides.resolving_view",
        "reads the server's arguments as resolved so far",
        call=("server_args",),
    ),
    Seam(f"{SRT}.utils.common.get_device", "the device of a start that names none", call=()),
    Seam(f"{SRT}.utils.common.is_remote_url", "what no loader of files reads", call=("url",)),
    Seam(f"{SRT}.utils.common.get_device_sm", "the GPU's capability, without CUDA", call=()),
    Seam(f"{SRT}.environ.envs", "SGLang's environment variables"),
    Seam(f"{SRT}.environ.Envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH", "a graph that is refused"),
    Seam(f"{SRT}.environ.EnvBool.get", "whether it is set, as SGLang reads it", call=()),
    Seam(
        f"{LAYERS}.attention.attention_registry.register_attention_backend",
        "registers the attention backend",
        call=("name",),
    ),
    Seam(
        f"{SRT}.arg_groups.choices.add_attention_backend_choices",
        "makes its name valid in --attention-backend",
    ),
    Seam(
        f"{LAYERS}.moe.moe_runner.runner.register_moe_runner_core",
        "registers the MoE runner's name",
        call=("backend_name", "factory"),
    ),
    Seam(
        f"{SRT}.arg_groups.choices.add_moe_runner_backend_choices",
        "makes its name valid in --moe-runner-backend",
    ),
    Seam(f"{SRT}.configs.step3p5.Step3p5Config", "registered with transformers"),
    Seam(f"{SRT}.configs.step3p7.Step3p7Config", "registered with transformers"),
)

ARGUMENTS = tuple(
    seam
    for owner, names in {
        "device.Device": ("device", "sleep_on_idle"),
        "exec_.ExecGraph": (
            "enable_torch_compile",
            "disable_cuda_graph",
            "disable_prefill_cuda_graph",
            "cuda_graph_config",
            "cuda_graph_backend_decode",
            "cuda_graph_backend_prefill",
        ),
        "exec_.ExecKernel": (
            "attention_backend",
            "prefill_attention_backend",
            "decode_attention_backend",
        ),
        "exec_.ExecMoe": (
            "moe_runner_backend",
            "moe_a2a_backend",
            "ep_num_redundant_experts",
            "enable_eplb",
        ),
        "exec_.ExecDeterministic": ("enable_deterministic_inference", "rl_on_policy_target"),
        "exec_.ExecOffload": ("cpu_offload_gb", "offload_group_size"),
        "exec_.ExecOverlap": ("enable_two_batch_overlap",),
        "disagg.Disagg": ("enable_pdmux",),
        "memory.Memory": ("enable_unified_memory",),
        "lora.Lora": ("enable_lora", "lora_paths"),
        "model.Model": (
            "model_path",
            "revision",
            "download_dir",
            "model_impl",
            "quantization",
            "model_loader_extra_config",
            "load_format",
            "dtype",
            "kv_cache_dtype",
        ),
        "parallel.Parallel": (
            "tp_size",
            "ep_size",
            "pp_size",
            "attn_dp_size",
            "attn_cp_size",
            "dcp_size",
            "moe_dp_size",
            "enable_dp_attention",
            "enable_layernorm_sp",
        ),
        "schedule.Schedule": ("max_total_tokens", "max_running_requests"),
        "spec.Spec": (
            "speculative_algorithm",
            "speculative_num_steps",
            "speculative_eagle_topk",
            "speculative_draft_model_path",
            "speculative_draft_attention_backend",
            "speculative_draft_kv_cache_dtype",
            "speculative_use_rejection_sampling",
            "enable_multi_layer_eagle",
        ),
    }.items()
    for seam in attributes(
        f"{SRT}.arg_groups.fields.{owner}", "a server argument read or set", *names
    )
)

HOOKED = (
    Seam(
        f"{SRT}.model_loader.utils.get_model_architecture",
        "--model-impl step37 chooses the model class",
        takes=("model_config",),
    ),
    Seam(
        f"{SRT}.model_loader.loader._get_quantization_config",
        "SGLang refuses fp32 activations for both quantised formats",
        takes=("model_config", "load_config"),
    ),
    Seam(
        f"{SRT}.model_executor.model_runner_components.moe_ep_setup"
        ".check_quantized_moe_compatibility",
        "SGLang refuses shards that begin inside an FP8 block",
        call=("model_config=", "tp_size=", "moe_ep_size=", "moe_dp_size="),
    ),
    Seam(
        f"{SRT}.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        "SGLang pads sizes on a CPU, which a checkpoint's shapes do not fit",
        takes=("model_config", "load_config", "tp_size"),
    ),
    Seam(
        f"{SRT}.arg_groups.model_path_hook.handle_model_source_paths",
        "the step of argument resolution at which a start is checked",
        takes=("server_args",),
    ),
    Seam(
        f"{SRT}.arg_groups.platform_hook.handle_cpu_backends",
        "SGLang chooses a CPU's attention backend without asking the platform",
        takes=("server_args",),
    ),
)

RUNTIME = (
    Seam(f"{SRT}.runtime_context.attention_backends", "the server's choice", call=()),
    Seam(f"{SRT}.runtime_context.get_model", "the checkpoint's folder", call=()),
    Seam(f"{SRT}.runtime_context.get_parallel", "ranks and sizes", call=()),
    Seam(
        f"{SRT}.distributed.tensor_model_parallel_all_reduce",
        "sums the expert block over ranks",
        call=("input_",),
    ),
    Seam(
        f"{SRT}.model_executor.forward_context.get_attn_backend",
        "the running backend, which knows the batch's place in the cache",
        call=(),
    ),
    *attributes(
        f"{SRT}.model_executor.model_runner", "gives the cache to the backend", "ModelRunner"
    ),
    Seam(
        f"{SRT}.model_executor.model_runner.resolve_sliding_window_size",
        "sets the runner's sliding_window_size: which sliding pages a pass can see",
    ),
    *attributes(
        BATCH,
        "what a batch tells the attention backend",
        "forward_mode",
        "batch_size",
        "seq_lens",
        "seq_lens_cpu",
        "extend_seq_lens",
        "req_pool_indices",
        "out_cache_loc",
        "spec_info",
    ),
    *attributes(
        f"{SRT}.model_executor.forward_batch_info.ForwardMode",
        "what the attention backend asks of a batch",
        "is_decode_or_idle",
    ),
    *attributes(
        f"{SRT}.model_executor.forward_batch_info.ForwardMode",
        "passes whose kernels are compiled at a start",
        "EXTEND",
        "DECODE",
    ),
    Seam(
        f"{SRT}.model_executor.model_runner.ModelRunner.spec_algorithm",
        "whether sequences are decoded or drafts verified",
    ),
    Seam(f"{SRT}.speculative.spec_info.SpeculativeAlgorithm.is_none", "no drafts", call=()),
    *attributes(
        f"{SRT}.mem_cache.swa_memory_pool.SWAKVPool",
        "where the attention backend reads and writes",
        "get_key_buffer",
        "get_value_buffer",
        "full_layer_nums",
        "full_to_swa_index_mapping",
    ),
    Seam(
        f"{LAYERS}.logits_processor.LogitsProcessor.forward",
        "logits of the last position of each sequence",
        call=(
            "input_ids",
            "hidden_states",
            "lm_head",
            "logits_metadata",
            "hidden_states_before_norm=",
        ),
    ),
)

MODEL = (
    Seam(
        f"{LINEAR}.QKVParallelLinear",
        "attention's q, k and v projection",
        call=(
            "hidden_size",
            "head_size",
            "total_num_heads",
            "total_num_kv_heads",
            "bias=",
            "prefix=",
        ),
    ),
    Seam(
        f"{LINEAR}.MergedColumnParallelLinear",
        "gate and up projection of the dense layers and the shared expert",
        call=("input_size", "output_sizes", "bias=", "prefix="),
    ),
    Seam(
        f"{LINEAR}.RowParallelLinear",
        "output and down projections",
        call=("input_size", "output_size", "bias=", "reduce_results=", "prefix="),
    ),
    Seam(
        f"{LINEAR}.ColumnParallelLinear",
        "the head gate and the vision projector",
        call=("input_size", "output_size", "bias=", "gather_output=", "quant_config=", "prefix="),
    ),
    Seam(
        f"{SRT}.model_loader.loader._post_load_weights",
        "calls the method of that name of a model whose weights are made up",
        before="0.5.21",
    ),
    Seam(
        f"{SRT}.model_loader.loader.post_load_weights",
        "calls the method of that name of a model whose weights are made up",
        since="0.5.21",
    ),
    Seam(
        f"{SRT}.model_executor.model_runner_components.weight_updater."
        "_unsupported_derived_weight_cache_error",
        "reads in the model's modules that it takes no new weights",
        since="0.5.21",
    ),
    Seam(
        f"{EMBEDDING}.VocabParallelEmbedding",
        "token embedding",
        call=("num_embeddings", "embedding_dim"),
    ),
    Seam(
        f"{EMBEDDING}.ParallelLMHead", "output embedding", call=("num_embeddings", "embedding_dim")
    ),
    Seam(f"{LAYERS}.moe.utils.get_moe_runner_backend", "which MoE runner the user chose", call=()),
    Seam(
        f"{LAYERS}.moe.ep_moe.layer.get_moe_impl_class",
        "SGLang's expert layer, for one of its runners",
        call=("quant_config",),
    ),
    Seam(
        f"{LAYERS}.moe.fused_moe_triton.layer.FusedMoE",
        "SGLang's expert layer, for one of its runners",
        call=(
            "num_experts=",
            "top_k=",
            "layer_id=",
            "hidden_size=",
            "intermediate_size=",
            "quant_config=",
            "prefix=",
            "routing_method_type=",
            "gemm1_clamp_limit=",
        ),
    ),
    Seam(
        f"{LAYERS}.moe.fused_moe_triton.layer.FusedMoE.forward",
        "runs it",
        call=("hidden_states", "topk_output"),
    ),
    Seam(
        f"{LAYERS}.moe.fused_moe_triton.layer.FusedMoE.weight_loader",
        "loads one expert into it",
        call=("param", "loaded_weight", "weight_name", "shard_id=", "expert_id="),
    ),
    Seam(f"{LAYERS}.moe.topk.StandardTopKOutput", "our router's choice, as that layer takes it"),
    *attributes(
        f"{LAYERS}.moe.topk.StandardTopKOutput",
        "our router's choice, as that layer takes it",
        "topk_weights",
        "topk_ids",
        "router_logits",
    ),
    Seam(
        f"{LAYERS}.moe.utils.RoutingMethodType.Renormalize", "what SGLang's own model class passes"
    ),
    Seam(
        f"{LAYERS}.logits_processor.LogitsProcessor",
        "last hidden states to logits",
        call=("config",),
    ),
    Seam(f"{LAYERS}.layernorm.GemmaRMSNorm", "the layers' norms", call=("hidden_size", "eps=")),
    Seam(
        f"{LAYERS}.radix_attention.RadixAttention",
        "names a layer to the cache and the attention backend",
        call=(
            "num_heads",
            "head_dim",
            "scaling",
            "num_kv_heads=",
            "layer_id=",
            "sliding_window_size=",
            "prefix=",
        ),
    ),
    *attributes(
        f"{LAYERS}.radix_attention.RadixAttention",
        "what a layer tells the attention backend",
        "k_scale_float",
        "v_scale_float",
        "tp_q_head_num",
        "tp_k_head_num",
        "qk_head_dim",
    ),
    Seam(
        f"{LAYERS}.rotary_embedding.get_rope",
        "the table of rotary cosines and sines",
        call=("head_size", "rotary_dim=", "max_position=", "base=", "rope_scaling=", "dtype="),
    ),
    Seam(
        f"{SRT}.models.step3_vl_10b.PerceptionEncoder",
        "the vision encoder",
        call=("config", "act_layer", "quant_config=", "prefix="),
    ),
    Seam(f"{SRT}.managers.schedule_batch.MultimodalDataItem", "one picture of a request"),
    Seam(f"{MULTIMODAL}.get_image_feature", "called once per picture", takes=("items",)),
    *attributes(MULTIMODAL, "inherited", "forward", "pad_input_ids"),
)

OVERRIDDEN = (
    Seam(f"{BACKEND}.init_forward_metadata", "cache metadata", takes=("forward_batch",)),
    Seam(
        f"{BACKEND}.init_forward_metadata_out_graph",
        "cache metadata of a captured pass",
        takes=("forward_batch", "in_capture"),
    ),
    Seam(
        f"{BACKEND}.init_cuda_graph_state",
        "the tables that captured passes read",
        takes=("max_bs", "max_num_tokens"),
    ),
    Seam(f"{BACKEND}.get_cuda_graph_seq_len_fill_value", "length of padding rows", takes=()),
    Seam(
        f"{BACKEND}.forward_extend",
        "attention of prompts",
        takes=("q", "k", "v", "layer", "forward_batch", "save_kv_cache", "**kwargs"),
    ),
    Seam(
        f"{BACKEND}.forward_decode",
        "attention of one new token per sequence",
        takes=("q", "k", "v", "layer", "forward_batch", "save_kv_cache", "**kwargs"),
    ),
    Seam(f"{BACKEND}.needs_cpu_seq_lens", "whether SGLang has to wait for lengths with drafts"),
    Seam(f"{BACKEND}.support_triton", "no Triton helpers on a CPU", takes=()),
    Seam(
        f"{QUANTIZATION}.QuantizationConfig.get_quant_method",
        "leaves all but the routed experts unquantised",
        takes=("layer", "prefix"),
    ),
    Seam(f"{QUANTIZATION}.QuantizeMethodBase", "what it returns"),
    Seam(
        f"{LAYERS}.quantization.unquant.UnquantizedLinearMethod",
        "the method of every linear layer",
        call=(),
    ),
    Seam(f"{LINEAR}.LinearBase", "tells a linear layer from others"),
    Seam(
        f"{QUANTIZATION}.LinearMethodBase.apply",
        "multiplies by FP8 weights where they were opted in",
        takes=("layer", "x", "bias"),
    ),
    Seam(f"{SRT}.platforms.cpu.CpuDeviceMixin", "base of the CPU platform"),
    Seam(f"{PLATFORM}.apply_server_args_defaults", "binds ranks to cores", takes=("server_args",)),
    Seam(f"{PLATFORM}.get_default_attention_backend", "our backend's name", takes=()),
    Seam(f"{PLATFORM}.get_compile_backend", "no Inductor", takes=("mode",)),
    Seam(f"{PLATFORM}.is_pin_memory_available", "there is nothing to pin for", takes=("device",)),
    Seam(f"{SRT}.platforms.device_mixin.PlatformEnum.OOT", "the kind of the platform"),
)

SEAMS = REGISTRATION + ARGUMENTS + HOOKED + RUNTIME + MODEL + OVERRIDDEN + DRAFTS
