"""`StoredTensor`: a tensor in an open safetensors file, and the reading of parts of it, fp8 with its scales too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from backends.scaled_weight import ScaledWeight
from xllm.errors import ModelError
from xllm.models.fp8_format import Fp8Format

FP8, POWERS_OF_TWO = "F8_E4M3", "F8_E8M0"
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # of the types that are read everywhere
SCALE_TYPES = (*ITEM_BYTES, POWERS_OF_TWO)
NOT_A_NUMBER = 0x7F  # of a code of E4M3, without its sign


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """handle: of the open file, by the safetensors library. name: as it is there."""

    file: Path
    handle: Any
    name: str

    @property
    def dtype(self) -> str:
        return str(self.handle.get_slice(self.name).get_dtype())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.handle.get_slice(self.name).get_shape())

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 1)

    def check_shape(self, shape: tuple[int, ...], who: str = "the config asks") -> None:
        """Raise ModelError if it has another one."""
        if self.shape != shape:
            raise self.error(f"has shape {list(self.shape)}, {who} for {list(shape)}")

    def read(self, part: tuple[int | slice, ...]) -> Tensor:
        """A part of the tensor as it lies in the file's map: what nobody touches is not read. Raises ModelError."""
        try:
            found: Tensor = self.handle.get_slice(self.name)[part]
        except (SafetensorError, OSError) as error:
            raise self.error(f"cannot be read: {error}") from None
        return found

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self.file}: tensor {self.name!r} {message}")


@dataclass(frozen=True, slots=True)
class StoredFp8:
    """A tensor of fp8, [Y, X] or [E, Y, X], and its scales. Raises ModelError if they do not fit together."""

    codes: StoredTensor
    scales: StoredTensor
    form: Fp8Format

    def __post_init__(self) -> None:
        *lead, num_rows, num_columns = self.codes.shape
        self.scales.check_shape((*lead, -(-num_rows // self.form.rows), -(-num_columns // self.form.columns)),
                                f"blocks of {self.form.rows} x {self.form.columns} ask")
        if self.scales.dtype not in SCALE_TYPES:
            raise self.scales.error(f"is of type {self.scales.dtype}; scales of fp8 are {', '.join(SCALE_TYPES)}")

    def read(self, part: tuple[int | slice, ...]) -> ScaledWeight:
        """Some rows and columns of a matrix, of [E, Y, X] the one of that number. The cuts may go through blocks. Codes
        may be as they lie in the map. Raises ModelError."""
        *lead, rows, columns = part
        assert isinstance(rows, slice) and isinstance(columns, slice)
        num_rows, num_columns = self.codes.shape[-2:]
        (y0, y1, _), (x0, x1, _) = rows.indices(num_rows), columns.indices(num_columns)
        first_row, first_column = y0 // self.form.rows, x0 // self.form.columns
        blocks = self.scales.read((*lead, slice(first_row, -(-y1 // self.form.rows)),
                                   slice(first_column, -(-x1 // self.form.columns)))).float()
        if not bool(((blocks > 0) & blocks.isfinite()).all()):
            raise self.scales.error("holds scales that are not positive and finite")
        group = math.gcd(x0, self.form.columns)  # no run reaches over the end of a block
        row_Y = torch.arange(y0, y1) // self.form.rows - first_row
        column_G = torch.arange(x0, x1, group) // self.form.columns - first_column
        codes_YX = self.codes.read((*lead, slice(y0, y1), slice(x0, x1)))
        if bool((codes_YX.view(torch.uint8) & NOT_A_NUMBER == NOT_A_NUMBER).any()):
            raise self.codes.error("holds codes of fp8 that are not numbers")  # kernels take each code for a number
        return ScaledWeight(codes_YX, blocks[row_Y][:, column_G], group)
