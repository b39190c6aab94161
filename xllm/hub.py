"""Finds a model's files: the bundled model, a local folder, or the Hub's cache."""

from __future__ import annotations

import logging
from pathlib import Path

from xllm.errors import ModelError

HUB_PATTERNS = ("*.json", "model*.safetensors", "*.jinja", "tokenizer*", "vocab*", "merges.txt",
                "[0-9]*_*/model.safetensors")  # of the modules of an embedding model, such as 2_Dense

log = logging.getLogger(__name__)


def resolve_model_path(model: str | None, revision: str | None = None) -> Path:
    """The local folder of a model: None is the bundled one, an existing folder itself, else a Hub id.

    Raises:
        ModelError: no such folder, no such model on the Hub, or the Hub cannot be reached.
    """
    if model is None:
        return Path(__file__).resolve().parent / "bundled"
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            log.warning("revision %s is ignored: %s is a local folder", revision, path)
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; a model is a folder with config.json and safetensors files")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or "\\" in model:
        raise ModelError(f"model folder {path} does not exist")
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    at = f"{model!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except hub.GatedRepoError:
        raise ModelError(f"model {at} is gated: accept its terms on the Hub and log in with `hf auth login`") from None
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
        raise ModelError(f"model {at} is neither a local folder nor on the Hub: {error}") from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HfHubHTTPError, OSError) as error:
        raise ModelError(f"model {at} is not in the local cache, and the Hub cannot be reached: {error}") from None
