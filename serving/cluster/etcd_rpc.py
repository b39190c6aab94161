"""The messages and calls of etcd's API out of the package `etcd3`, whose generated code today's protobuf refuses.

etcd3 0.12 was generated in 2020; protobuf since 4.21 does not let such modules build their messages ("Descriptors
cannot be created directly"). The descriptors in them are as good as ever: they are read from the files as data, and
modules made of them take the places of those that fail. grpc's asyncio channels take etcd3's stubs as they are. Its own
client is not used: it blocks, keeps one address, drops the causes of errors, and its watches end with the connection.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

from xllm.errors import ConfigError

_FILES = ("kv", "auth", "rpc")  # the last one needs the others


@cache
def etcd_rpc() -> Any:
    """The package `etcd3.etcdrpc`. Raises ConfigError that names the extra if it is not installed."""
    try:
        found = importlib.util.find_spec("etcd3")
        import grpc.aio  # noqa: F401, what the stubs are called over
        from google.protobuf import descriptor_pb2  # noqa: F401
    except ImportError as error:
        raise _missing(error) from None
    if found is None or not found.submodule_search_locations:
        raise _missing("etcd3 is not there")
    folder = Path(found.submodule_search_locations[0]) / "etcdrpc"
    if not (folder / "rpc_pb2_grpc.py").exists():  # the package etcd3-py has a module of the same name
        raise _missing(f"{folder.parent} is another package of that name")
    for name in _FILES:
        module = f"etcd3.etcdrpc.{name}_pb2"
        if module not in sys.modules:
            sys.modules[module] = _rebuilt(module, name, folder / f"{name}_pb2.py")
    import etcd3.etcdrpc as rpc

    return rpc


def _missing(cause: object) -> ConfigError:
    return ConfigError(f"etcd needs the extra 'etcd': pip install 'xllm-engine[etcd]' ({cause})")


def _rebuilt(module: str, name: str, path: Path) -> types.ModuleType:
    """The module that protoc would generate today from the file's descriptor."""
    from google.protobuf import descriptor_pb2, descriptor_pool
    from google.protobuf.internal import builder

    described = descriptor_pb2.FileDescriptorProto.FromString(_serialized(path))
    # Others may have a file `kv.proto` in the same pool.
    described.name = f"etcd3/{name}.proto"
    for index, needed in enumerate(described.dependency):
        if needed.removesuffix(".proto") in _FILES:
            described.dependency[index] = f"etcd3/{needed}"
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(described.SerializeToString())
    descriptor = pool.FindFileByName(described.name)
    made = types.ModuleType(module)
    made.__dict__["DESCRIPTOR"] = descriptor
    builder.BuildMessageAndEnumDescriptors(descriptor, made.__dict__)
    builder.BuildTopDescriptorsAndMessages(descriptor, module, made.__dict__)
    return made


def _serialized(path: Path) -> bytes:
    """The `serialized_pb` of a generated file, which is written as text of one byte a character."""
    for node in ast.walk(ast.parse(path.read_text(encoding="latin-1"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "FileDescriptor":
            written = next(each.value for each in node.keywords if each.arg == "serialized_pb")
            literal = written.args[0] if isinstance(written, ast.Call) else written
            return str(ast.literal_eval(literal)).encode("latin-1")
    raise _missing(f"{path} has no descriptor")
