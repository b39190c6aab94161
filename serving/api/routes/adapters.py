"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters come and go while the server runs.

Both need an admin key.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import Request
from fastapi.responses import Response

from serving.api.admin_calls import control
from serving.api.errors import ApiError, invalid, json_response
from serving.api.gate import Access
from serving.api.route import Needs, Route
from serving.api.state import ServerState
from serving.api.types import LoadAdapterBody, UnloadAdapterBody
from serving.security.paths import contained
from xllm.errors import RequestError
from xllm.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS


async def load_adapter(state: ServerState, request: Request, body: LoadAdapterBody) -> Response:
    state.check_adapter_name(body.lora_name, "lora_name")
    folder = adapter_folder(state.config.http.lora_folder, body.lora_path)
    done = await control(state, "load_adapter", name=body.lora_name, folder=str(folder))
    return json_response({"adapters": done.state.adapters})


async def unload_adapter(state: ServerState, request: Request, body: UnloadAdapterBody) -> Response:
    done = await control(state, "unload_adapter", name=body.lora_name)
    return json_response({"adapters": done.state.adapters})


def adapter_folder(root: str | None, wish: str) -> Path:
    """An adapter's folder below `--lora-folder`. Raises ApiError."""
    if root is None:
        raise ApiError(403, "adapters are loaded at run time only from --lora-folder, which was not given")
    try:
        folder = contained(Path(root), wish)
    except RequestError:
        folder = Path(root)
    if folder == Path(root) or not folder.is_dir() or any(
            _leads_out(folder / name, Path(root)) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        raise invalid("lora_path must be a folder below the server's --lora-folder, and so must its files be",
                      "lora_path")
    return folder


def _leads_out(file: Path, root: Path) -> bool:
    try:
        return not file.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return True


ROUTES = (
    Route("POST", "/v1/load_lora_adapter", Access.ADMIN, LoadAdapterBody, load_adapter, Needs.NOTHING),
    Route("POST", "/v1/unload_lora_adapter", Access.ADMIN, UnloadAdapterBody, unload_adapter, Needs.NOTHING),
)
