"""Worker messages as bytes: one byte for the type, then msgpack. Only the types of `messages.py` are ever made.

Of a step's new rows the sampling parameters are written once where they are shared, and are one object again at every
rank, also for rows of a call that enter in later steps.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import numpy as np

from xllm.shared_params import SharedParams, read_shared, share, without
from xllm.step import NewRow, ScheduleOutput
from xllm.worker.inline import Wire
from xllm.worker.messages import WorkerCommand, WorkerReport

KINDS: tuple[type, ...] = (*get_args(WorkerCommand), *get_args(WorkerReport))
if TYPE_CHECKING:
    _NewRowHead = Any
else:
    _NewRowHead = without(NewRow, "_NewRowHead", ("sampling",), variant=int)
_ROW_FIELDS = tuple(f.name for f in dataclasses.fields(NewRow) if f.name != "sampling")


@dataclasses.dataclass(frozen=True, slots=True)
class _PackedPlan:
    """A plan with new rows whose parameters may be large; `plan` has none of them."""

    plan: ScheduleOutput
    params: SharedParams
    heads: list[_NewRowHead]


_TAGS = {kind: bytes([tag]) for tag, kind in enumerate(KINDS)}
_PACKED_PLAN = bytes([len(KINDS)])
_NUMBERS = "iufb"  # kinds of numpy's types that arrays may have


def _pack_array(value: object) -> object:
    """(type, shape, bytes) of an array; what msgspec does not know beside arrays is a bug."""
    assert isinstance(value, np.ndarray), f"{type(value).__name__} cannot be sent"
    return value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes()


def _unpack_array(kind: type, value: Any) -> object:
    assert kind is np.ndarray, kind
    name, shape, data = value
    dtype = np.dtype(name)
    if dtype.kind not in _NUMBERS:
        raise ValueError(f"an array of {name}")
    return np.frombuffer(data, dtype=dtype).reshape(shape).copy()


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_pack_array)


@cache
def _decoder(tag: int) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder([*KINDS, _PackedPlan][tag], dec_hook=_unpack_array)


def encode(message: WorkerCommand | WorkerReport) -> bytes:
    """The message as bytes."""
    if isinstance(message, ScheduleOutput) and any(new.sampling.has_collections for new in message.new_rows):
        return _PACKED_PLAN + _ENCODER.encode(_packed(message))
    return _TAGS[type(message)] + _ENCODER.encode(message)


def decode(frame: bytes | memoryview) -> Any:
    """The message from its bytes: a `WorkerCommand` or a `WorkerReport`. Raises ValueError for anything else."""
    view = memoryview(frame)
    if not len(view) or view[0] > len(KINDS):
        raise ValueError("a message of an unknown type")
    found = _decoder(view[0]).decode(view[1:])
    return _unpacked(found) if isinstance(found, _PackedPlan) else found


def _packed(plan: ScheduleOutput) -> _PackedPlan:
    params, variants = share([new.sampling for new in plan.new_rows])
    heads = [_NewRowHead(*(getattr(new, name) for name in _ROW_FIELDS), variant)
             for new, variant in zip(plan.new_rows, variants, strict=True)]
    return _PackedPlan(dataclasses.replace(plan, new_rows=()), params, heads)


def _unpacked(packed: _PackedPlan) -> ScheduleOutput:
    try:
        samplings = read_shared(packed.params)
        new_rows = tuple(NewRow(sampling=samplings[head.variant], **{name: getattr(head, name) for name in _ROW_FIELDS})
                         for head in packed.heads)
    except IndexError:
        raise ValueError("a row without its sampling parameters") from None
    return dataclasses.replace(packed.plan, new_rows=new_rows)


CODED = Wire(down=lambda command: decode(encode(command)), up=lambda report: decode(encode(report)))
