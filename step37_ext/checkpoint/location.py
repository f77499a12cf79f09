"""Where a checkpoint's files are on this machine: a folder, or a snapshot in the hub's cache."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from step37_ext.checkpoint.headers import INDEX_FILE, SINGLE_FILE

logger = logging.getLogger(__name__)

CONFIG_FILES = ("config.json", "hf_quant_config.json")


def local_folder(model_path: str, revision: str | None = None) -> Path | None:
    """The folder with a checkpoint's config files, or None if they are not here.

    Args:
        model_path: a folder, or a repository's name.
    """
    return _folder_with(("config.json",), model_path, revision, None)


def weights_folder(
    model_path: str, revision: str | None = None, download_dir: str | None = None
) -> Path | None:
    """The folder with a checkpoint's weights, or None if they are not here.

    Args:
        model_path: a folder, or a repository's name.
        download_dir: where SGLang puts a repository's weights, and nothing else, in place of the
            hub's cache.
    """
    return _folder_with((INDEX_FILE, SINGLE_FILE), model_path, revision, download_dir)


def _folder_with(
    files: tuple[str, ...], model_path: str, revision: str | None, cache_dir: str | None
) -> Path | None:
    """`model_path` itself, or its snapshot in a cache with one of `files`."""
    if Path(model_path).is_dir():
        return Path(model_path)
    for file in files:
        try:
            found = try_to_load_from_cache(model_path, file, cache_dir=cache_dir, revision=revision)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


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
