"""Everything that step37_ext registers with SGLang, on one screen.

SGLang calls `register` in each of its processes and only logs what it raises, so that a failure is
kept and raised later, in a start that asks for `--model-impl step37`; other starts go on without.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import sys
from importlib.metadata import version
from typing import Any

logger = logging.getLogger(__name__)

MODEL_LOADER = "sglang.srt.model_loader"


def register() -> None:
    """Entry point of `sglang.srt.plugins`."""
    try:
        _register()
    except Exception as error:
        _fail_where_asked_for(f"--model-impl step37 cannot start: {error}")


def _register() -> None:
    from step37_ext.compat import supported_version, unchecked_version

    installed = version("sglang")
    if refusal := supported_version(installed):
        raise RuntimeError(refusal)
    if warning := unchecked_version(installed):
        logger.warning(warning)
    if os.environ.get("TRITON_INTERPRET") == "1":
        # Our own kernels run in the interpreter then; as shipped it gets their numbers wrong.
        from step37_kernels import interpret

        interpret.enable()
    _register_seams()


def _register_seams() -> None:
    from sglang.srt.arg_groups.choices import (
        add_attention_backend_choices,
        add_moe_runner_backend_choices,
    )
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.configs.step3p5 import Step3p5Config
    from sglang.srt.configs.step3p7 import Step3p7Config
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.layers.moe.moe_runner.runner import register_moe_runner_core
    from transformers import AutoConfig

    from step37_ext import hooks

    # transformers 5.13 and later have classes of these names too, which SGLang cannot read.
    AutoConfig.register("step3p5", Step3p5Config, exist_ok=True)
    AutoConfig.register("step3p7", Step3p7Config, exist_ok=True)

    register_resolution_hook("handle_model_source_paths")(hooks.check_start)
    register_resolution_hook("handle_cpu_backends")(hooks.default_cpu_backends)

    register_attention_backend("step37")(hooks.attention_backend)
    add_attention_backend_choices(["step37"])
    register_moe_runner_core("step37", hooks.refuse_runner_core)
    add_moe_runner_backend_choices(["step37"])

    around(
        # The public registry of model classes does not know --model-impl.
        (f"{MODEL_LOADER}.utils.get_model_architecture", hooks.model_architecture),
        # The public table of quantisations is read before --model-impl, and refuses float32.
        (f"{MODEL_LOADER}.loader._get_quantization_config", hooks.quantization_config),
        # FP8 shards may begin inside a block here; stock refuses them with no way to say so.
        (
            "sglang.srt.model_executor.model_runner_components.moe_ep_setup"
            ".check_quantized_moe_compatibility",
            hooks.quantized_moe_compatibility,
        ),
        # Stock pads sizes for its AMX kernels whenever the device is a CPU.
        (
            "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
            hooks.cpu_padding,
        ),
        # SGLang's list of attention backends that may extend drafts is not open to others.
        (
            "sglang.srt.speculative.draft_utils.DraftBackendFactory.create_draft_extend_backend",
            hooks.draft_extend_backend,
        ),
    )


def around(*wrappers: tuple[str, Any]) -> None:
    """Wrap each target, and see that it was: SGLang only logs a target that has moved."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    stock = {}
    for target, wrapper in wrappers:
        try:
            stock[target] = pkgutil.resolve_name(target)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(f"{target} is not in this SGLang ({error})") from error
        HookRegistry.register(target, wrapper, HookType.AROUND)
    HookRegistry.apply_hooks()
    for target, original in stock.items():
        if pkgutil.resolve_name(target) is original:
            raise RuntimeError(f"{target} could not be wrapped")


def _fail_where_asked_for(message: str) -> None:
    """Raise `message` in a start with `--model-impl step37`, as early as this SGLang lets it."""

    def stop(config: Any) -> None:
        if str(getattr(config, "model_impl", "")).lower() == "step37":
            raise RuntimeError(message)

    def resolution_step(server_args: Any, previous: Any) -> None:
        stop(server_args)
        previous(server_args)

    def choice_of_class(original: Any, model_config: Any) -> Any:
        stop(model_config)
        return original(model_config)

    try:
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

        register_resolution_hook("handle_model_source_paths")(resolution_step)
    except Exception:
        # An SGLang without that seam: its command line, and the class of a model in any start.
        if "--model-impl step37" in " ".join(sys.argv).replace("=", " "):
            raise SystemExit(message) from None
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        target = f"{MODEL_LOADER}.utils.get_model_architecture"
        HookRegistry.register(target, choice_of_class, HookType.AROUND)
