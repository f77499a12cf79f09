"""What the model needs to know about the running server, in one place."""

from __future__ import annotations

from pathlib import Path

from sglang.srt.runtime_context import attention_backends, get_model


def attention_backend_names() -> tuple[str, str]:
    """Names of the attention backends for prefill and for decode."""
    return attention_backends()


def checkpoint_folder() -> Path | None:
    """The checkpoint's folder, or None if the server was given a repository's name."""
    path = Path(get_model().model_path)
    return path if path.is_dir() else None
