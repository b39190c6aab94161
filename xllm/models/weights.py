"""`WeightSource`: the tensors of a safetensors checkpoint, handed out one at a time by name.

A taken tensor, or a rank's part of one, is copied out of the file's memory map: the rest is never read, and peak memory
is what the layers keep plus the layer being built. Formats that are pickles inside are refused: loading one can run
any code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xllm.errors import ModelError
from xllm.model_files import read_json
from xllm.parallel.shard import Shard

ReadProgress = Callable[[int, int], None]  # (bytes of the files read so far, bytes in all)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_FILES = 4096  # chosen: the largest checkpoints have some hundreds; each stays mapped while the layers are built
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
BASE_PREFIX, HEAD_PREFIX, BARE_TABLE = "model.", "lm_head.", "embed_tokens.weight"
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # a buffer that old checkpoints carry; recomputed from the config


class WeightSource:
    """Opens every file of a checkpoint when entered; closes them when left.

        with WeightSource(folder, dtype=torch.float32, device=device) as weights:
            table_VD = weights.take("model.embed_tokens.weight", (vocab_size, hidden_size))
            weights.check_all_taken()

    Raises ModelError, naming the file and the tensor, for anything that is missing, broken or left over.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, progress: ReadProgress | None = None):
        self._dtype, self._device, self._progress = dtype, device, progress
        self._stack = ExitStack()
        self._left: dict[str, tuple[Path, Any, str]] = {}  # name -> its file, the open handle, its name there
        self.is_bare = False
        self._done_bytes = self._total_bytes = 0
        self._location = folder
        try:
            self._open_all(folder)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> WeightSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._left.clear()
        self._stack.close()

    def take(self, name: str, shape: tuple[int, ...], shard: Shard | None = None, *,
             dtype: torch.dtype | None = None) -> Tensor:
        """See `xllm.layers.layer_context.Weights`."""
        if name not in self._left:
            raise ModelError(f"tensor {name!r} is missing in {self._location}")
        file, handle, stored = self._left.pop(name)
        found = handle.get_slice(stored)
        if tuple(found.get_shape()) != shape:
            raise ModelError(f"{file}: tensor {name!r} has shape {found.get_shape()}, the config asks for "
                             f"{list(shape)}")
        if found.get_dtype() not in ITEM_BYTES:
            raise ModelError(f"{file}: tensor {name!r} is of type {found.get_dtype()}; only "
                             f"{', '.join(ITEM_BYTES)} can be read")
        try:
            view = handle.get_tensor(stored) if shard is None or shard.count == 1 else found[shard.of(shape)]
            tensor: Tensor = view.to(device=self._device, dtype=dtype or self._dtype, copy=True,
                                     memory_format=torch.contiguous_format)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: tensor {name!r} cannot be read: {error}") from None
        self._done_bytes += _nbytes(found)
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)
        return tensor

    def has(self, name: str) -> bool:
        """See `xllm.layers.layer_context.Weights`."""
        return name in self._left

    def skip(self, prefix: str) -> int:
        """See `xllm.layers.layer_context.Weights`."""
        found = [name for name in self._left if name.startswith(prefix)]
        for name in found:
            del self._left[name]
        return len(found)

    def check_all_taken(self) -> None:
        """Raise ModelError if tensors are left that no layer took or skipped, except buffers that are never needed."""
        unexpected = sorted(name for name in self._left if not name.endswith(IGNORED_SUFFIXES))
        if unexpected:
            file, _, stored = self._left[unexpected[0]]
            more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
            raise ModelError(f"{file}: tensor {stored!r}{more} is not part of this architecture")
        if self._progress is not None and self._done_bytes < self._total_bytes:
            self._progress(self._total_bytes, self._total_bytes)

    def _open_all(self, folder: Path) -> None:
        placed = checkpoint_files(folder)
        for file, names in placed.items():
            try:
                handle = self._stack.enter_context(safe_open(str(file), framework="pt"))
                found = set(handle.keys())
            except (SafetensorError, OSError, MemoryError) as error:
                raise ModelError(f"{file} is truncated or corrupt: {error}") from None
            except RuntimeError as error:  # torch's, of a file that is larger than memory
                raise ModelError(f"{file} cannot be read: {error}") from None
            absent = sorted(names - found)
            if absent:
                raise ModelError(f"{file} lacks tensor {absent[0]!r}, which {INDEX_FILE} places there")
            self._left.update((name, (file, handle, name)) for name in found if name in names or name not in self._left)
        self._total_bytes = sum(_nbytes(handle.get_slice(name)) for name, (_, handle, _) in self._left.items())
        self._complete_names()
        self._location = next(iter(placed)) if len(placed) == 1 else folder / INDEX_FILE


    def _complete_names(self) -> None:
        """Checkpoints of embedding models are published without the first part of the names."""
        self.is_bare = BARE_TABLE in self._left and not any(name.startswith(BASE_PREFIX) for name in self._left)
        if self.is_bare:
            self._left = {name if name.startswith(HEAD_PREFIX) else BASE_PREFIX + name: found
                          for name, found in self._left.items()}


def _nbytes(tensor_slice: Any) -> int:
    return math.prod(tensor_slice.get_shape()) * ITEM_BYTES.get(tensor_slice.get_dtype(), 1)


def checkpoint_files(folder: Path) -> dict[Path, set[str]]:
    """The safetensors files of a checkpoint, each with the tensors that an index places there."""
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: set()}
    if (folder / INDEX_FILE).is_file():
        return _read_index(folder)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelError(f"{folder} holds weights only as {pickles[0]}, a pickle, which can run code when it is "
                         "loaded; convert the checkpoint to safetensors")
    raise ModelError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_index(folder: Path) -> dict[Path, set[str]]:
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: 'weight_map' is missing or empty")
    placed: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or "\\" in file_name:
            raise ModelError(f"{index}: tensor {name!r} is placed in {file_name!r}, which is not a plain file name")
        placed.setdefault(folder / file_name, set()).add(name)
    if len(placed) > MAX_FILES:
        raise ModelError(f"{index} names {len(placed)} files; {MAX_FILES} at most are read")
    for file in placed:
        if not file.is_file():
            raise ModelError(f"{index} names {file.name}, which does not exist")
    return placed
