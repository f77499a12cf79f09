"""Where a checkpoint's files are on this machine: a folder, or a snapshot in the hub's cache."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

logger = logging.getLogger(__name__)

CONFIG_FILES = ("config.json", "hf_quant_config.json")


def local_folder(model_path: str, revision: str | None = None) -> Path | None:
    """The folder with what is here of a checkpoint, or None if nothing is.

    Args:
        model_path: a folder, or a repository's name.
    """
    if Path(model_path).is_dir():
        return Path(model_path)
    try:
        config = try_to_load_from_cache(model_path, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def folder_with_configs(model_path: str, revision: str | None = None) -> Path | None:
    """As `local_folder`, after fetching a repository's config files, as SGLang is about to do.

    None where they cannot be fetched: SGLang, which fetches them next, says why.
    """
    if not Path(model_path).is_dir():
        for file in CONFIG_FILES:
            try:
                hf_hub_download(model_path, file, revision=revision)
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
                logger.debug("step37: %s of %s: %s", file, model_path, error)
    return local_folder(model_path, revision)
