"""`WeightSource`: the tensors of a safetensors checkpoint, handed out one at a time by name.

A taken tensor, or a rank's part of one, is copied out of the file's memory map: the rest is never read, and peak memory
is what the layers keep plus the layer being built. Formats that are pickles inside are refused: loading one can run
any code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backends.scaled_weight import ScaledWeight, stack_rows
from xllm.errors import ModelError
from xllm.layers.layer_context import Part
from xllm.model_files import read_json
from xllm.models.fp8_format import SCALE_SUFFIX, Fp8Format
from xllm.models.stored_tensor import FP8, ITEM_BYTES, StoredFp8, StoredTensor
from xllm.parallel.shard import Shard

ReadProgress = Callable[[int, int], None]  # (bytes of the files read so far, bytes in all)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_FILES = 4096  # chosen: the largest checkpoints have some hundreds; each stays mapped while the layers are built
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
BASE_PREFIX, HEAD_PREFIX, BARE_TABLE = "model.", "lm_head.", "embed_tokens.weight"
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # a buffer that old checkpoints carry; recomputed from the config


class WeightSource:
    """Opens every file of a checkpoint when entered; closes them when left.

        with WeightSource(folder, dtype=torch.float32, device=device) as weights:
            table_VD = weights.take("model.embed_tokens.weight", (vocab_size, hidden_size))
            weights.check_all_taken()

    Raises ModelError, naming the file and the tensor, for anything that is missing, broken or left over.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, progress: ReadProgress | None = None,
                 fp8: Fp8Format | None = None, keeps_fp8: bool = False):
        """fp8: the form of the matrices that are fp8; None: there are none. keeps_fp8: products get them as they
        are."""
        self._dtype, self._device, self._progress = dtype, device, progress
        self._fp8, self._keeps_fp8 = fp8, keeps_fp8
        self._stack = ExitStack()
        self._left: dict[str, StoredTensor] = {}
        self.is_bare = False
        self._done_bytes, self._total_bytes = 0.0, 0
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
        found = self._take(name, shape, shard, keeps_fp8=False, dtype=dtype)
        assert isinstance(found, Tensor)
        return found

    def take_matrix(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> Tensor | ScaledWeight:
        """See `xllm.layers.layer_context.Weights`."""
        return self._take(name, shape, shard, keeps_fp8=self._keeps_fp8)

    def take_experts(self, name: str, shape: tuple[int, int, int],
                     parts: Sequence[Part]) -> Iterator[Tensor | ScaledWeight]:
        """See `xllm.layers.layer_context.Weights`."""
        stored = self._find(name, shape)
        for expert in range(shape[0]):
            yield stack_rows([self._read(stored, (expert, *part), self._keeps_fp8) for part in parts])
            self._count(stored, shape[0])

    def _take(self, name: str, shape: tuple[int, ...], shard: Shard | None, *, keeps_fp8: bool,
              dtype: torch.dtype | None = None) -> Tensor | ScaledWeight:
        stored = self._find(name, shape)
        found = self._read(stored, (slice(None),) * len(shape) if shard is None else shard.of(shape), keeps_fp8,
                           dtype)
        self._count(stored)
        return found

    def _find(self, name: str, shape: tuple[int, ...]) -> StoredTensor | StoredFp8:
        """The tensor of that name, with its scales if it is fp8. Raises ModelError if it is not as it should be."""
        stored = self._pop(name)
        stored.check_shape(shape)
        if stored.dtype == FP8 and self._fp8 is not None and len(shape) > 1:
            return StoredFp8(stored, self._pop(f"{name}{SCALE_SUFFIX}"), self._fp8)
        if stored.dtype not in ITEM_BYTES:
            fp8 = "" if self._fp8 is None else f" and, with scales, matrices of {FP8}"
            more = ": fp8 needs a quantization_config in config.json" if stored.dtype == FP8 and not fp8 else ""
            raise stored.error(f"is of type {stored.dtype}; only {', '.join(ITEM_BYTES)}{fp8} can be read{more}")
        if f"{name}{SCALE_SUFFIX}" in self._left:
            raise stored.error(f"is of type {stored.dtype}, and has scales as if it were fp8: {name}{SCALE_SUFFIX}")
        return stored

    def _pop(self, name: str) -> StoredTensor:
        if name not in self._left:
            raise ModelError(f"tensor {name!r} is missing in {self._location}")
        return self._left.pop(name)

    def _read(self, stored: StoredTensor | StoredFp8, part: tuple[int | slice, ...], keeps_fp8: bool,
              dtype: torch.dtype | None = None) -> Tensor | ScaledWeight:
        """A copy of that part on the device. fp8 is made plain here, as not every device knows it."""
        if isinstance(stored, StoredTensor):
            return stored.read(part).to(device=self._device, dtype=dtype or self._dtype, copy=True,
                                        memory_format=torch.contiguous_format)
        found = stored.read(part)
        return found.to(self._device) if keeps_fp8 else found.dequantise(dtype or self._dtype).to(self._device)

    def _count(self, stored: StoredTensor | StoredFp8, num_parts: int = 1) -> None:
        """One of so many equal parts of the tensor has been read."""
        tensors = (stored,) if isinstance(stored, StoredTensor) else (stored.codes, stored.scales)
        self._done_bytes += sum(tensor.num_bytes for tensor in tensors) / num_parts
        if self._progress is not None:
            self._progress(round(self._done_bytes), self._total_bytes)

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
            first = self._left[unexpected[0]]
            more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
            raise ModelError(f"{first.file}: tensor {first.name!r}{more} is not part of this architecture")
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
            self._left.update((name, StoredTensor(file, handle, name)) for name in found
                              if name in names or name not in self._left)
        self._total_bytes = sum(stored.num_bytes for stored in self._left.values())
        self._complete_names()
        self._location = next(iter(placed)) if len(placed) == 1 else folder / INDEX_FILE

    def _complete_names(self) -> None:
        """Checkpoints of embedding models are published without the first part of the names."""
        self.is_bare = BARE_TABLE in self._left and not any(name.startswith(BASE_PREFIX) for name in self._left)
        if self.is_bare:
            self._left = {name if name.startswith(HEAD_PREFIX) else BASE_PREFIX + name: found
                          for name, found in self._left.items()}


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
