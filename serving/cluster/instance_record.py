"""`InstanceRecord`: what an instance writes of itself into the metadata store, and under which key.

Keys, and the fields that upstream's engines write too, have upstream's names; the value is a JSON object. Fields that
are not known are ignored, so that a newer instance is read; one that is missing or malformed refuses the record.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from xllm.host_port import host_and_port

ROLES = ("DEFAULT", "PREFILL", "DECODE", "MIX")  # at upstream's numbers, which the field `type` has
MAX_RECORD_BYTES = 2**16  # Chosen: a hundred times what a record takes
_MAX_NAME = 200  # characters. Chosen: twice a long host name


class BadRecordError(Exception):
    """What is written under an instance's key is no record of one; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRecord:
    """name: of the instance, which is one at a time. rpc_address: HOST:PORT of its gate. incarnation_id: of its engine,
    as the gate's greeting has it. register_ts_ms: when that was registered first, in ms since 1970. type: the role's
    number in `ROLES`. http_address: HOST:PORT of its own HTTP API. model_names: which requests may use. fingerprint: of
    the model. protocol: of the gate. version: of xLLM. draining: it takes no more requests and is about to end."""

    name: str
    rpc_address: str
    incarnation_id: str
    register_ts_ms: int
    type: int
    http_address: str
    model_names: tuple[str, ...]
    fingerprint: str
    protocol: int
    version: str
    max_model_len: int
    block_size: int
    dp_size: int = 1
    tp_size: int = 1
    draining: bool = False

    @property
    def role(self) -> str:
        """One of `ROLES`."""
        return ROLES[self.type]

    @property
    def key(self) -> bytes:
        """Where it is written."""
        return instance_key(self.role, self.name)

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)


def role_prefix(role: str) -> bytes:
    """Of the keys of all instances in a role."""
    return f"XLLM:{role}:".encode()


def instance_key(role: str, name: str) -> bytes:
    """Of an instance."""
    return role_prefix(role) + name.encode()


def named_by(key: bytes) -> tuple[str, str]:
    """Role and name of an instance's key."""
    _, role, name = key.split(b":", 2)
    return role.decode(), name.decode(errors="replace")


def check_name(name: str) -> None:
    """Raises ValueError for what cannot be an instance's name."""
    if not name or len(name) > _MAX_NAME or not name.isprintable() or name.strip() != name:
        raise ValueError(f"a name has 1 to {_MAX_NAME} characters that can be shown, and no blanks around them; this "
                         f"is {name[:_MAX_NAME]!r}")


def read_record(key: bytes, value: bytes) -> InstanceRecord:
    """The record under a key. Raises BadRecordError."""
    if len(value) > MAX_RECORD_BYTES:
        raise BadRecordError(f"{len(value)} bytes, and a record has {MAX_RECORD_BYTES} at most")
    try:
        record = msgspec.json.decode(value, type=InstanceRecord)
        _check(record)
    except (msgspec.DecodeError, ValueError) as error:  # msgspec.ValidationError is a DecodeError, ConfigError none
        raise BadRecordError(str(error)) from None
    if (record.role, record.name) != named_by(key):
        raise BadRecordError(f"it is of {record.role} {record.name!r}, and stands under {key.decode(errors='replace')}")
    return record


def _check(record: InstanceRecord) -> None:
    check_name(record.name)
    if not 0 <= record.type < len(ROLES):
        raise ValueError(f"type {record.type} is none of 0 to {len(ROLES) - 1}")
    if not host_and_port(record.rpc_address)[1]:
        raise ValueError(f"rpc_address {record.rpc_address} has no port")
    if not record.incarnation_id or not record.fingerprint:
        raise ValueError("incarnation_id and fingerprint must not be empty")
    if not record.model_names or not all(record.model_names):
        raise ValueError("model_names must be names")
    for field in ("max_model_len", "block_size", "dp_size", "tp_size"):
        if getattr(record, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(record, field)}")
