"""CHECKPOINT... to what SGLang chooses for each, without and with --trust-remote-code, as JSON."""

import json
import sys

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.utils import get_model_architecture
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args


def chosen(checkpoint: str, *flags: str) -> dict[str, object]:
    """The model class, the config class and the text model's config."""
    arguments = ["--model-path", checkpoint, "--device", "cpu", "--model-impl", "step37", *flags]
    server_args = prepare_server_args(arguments)
    server_args.resolve_once()
    config = ModelConfig.from_server_args(server_args)
    model, _ = get_model_architecture(config)
    return {
        "model": f"{model.__module__}.{model.__name__}",
        "config": f"{type(config.hf_config).__module__}.{type(config.hf_config).__name__}",
        "text": config.hf_config.text_config.to_dict(),
    }


if __name__ == "__main__":
    load_plugins()
    print(
        json.dumps(
            [
                chosen(checkpoint, *flags)
                for checkpoint in sys.argv[1:]
                for flags in ((), ("--trust-remote-code",))
            ]
        )
    )
