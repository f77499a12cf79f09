"""What the model needs to know about the running server, in one place."""

from __future__ import annotations

from pathlib import Path

from sglang.srt.runtime_context import attention_backends, get_model

from step37_ext.checkpoint.location import local_folder


def attention_backend_names() -> tuple[str, str]:
    """Names of the attention backends for prefill and for decode."""
    return attention_backends()


def checkpoint_folder() -> Path | None:
    """The checkpoint's folder, or None if it is not on this machine."""
    model = get_model()
    return local_folder(model.model_path, model.revision)
