"""The file of `xllm profile --json`, as far as an engine reads it: what was measured (`Profile`), and on what
(`CostOrigin`). The fitted model stands beside them for people and other programs; an engine fits anew, in milliseconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from xllm.cost.observations import MeasuredMove, MeasuredStep, Profile, StepWork
from xllm.errors import ConfigError, ModelError
from xllm.model_files import read_json

FORMAT = 1  # of the file; raised when its members change
SETTING = "cost_profile"
MOST_ENTRIES = 1_000_000  # of one column. Chosen: a profile has some thousands
MOST = 1e15  # of a count. Chosen: more bytes than any machine has
LEAST_S, MOST_S = 1e-9, 1e6  # of a duration. Chosen: nothing that is measured lies outside
STEP_COLUMNS, MOVE_COLUMNS = (*StepWork._fields, "seconds"), ("num_bytes", "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostOrigin:
    """What observations hold for: all of it but the model's name, which may be a path, must be the same.

    version: of xLLM, whose kernels were measured. config: a digest of the checkpoint's config.json and what overrides
    it. device_name: as its maker calls it.
    """

    version: str
    model: str
    config: str
    quantization: str | None
    device: str
    device_name: str
    dtype: str
    kv_dtype: str
    num_threads: int
    tensor_parallel_size: int

    def check(self, here: CostOrigin, path: Path) -> None:
        """Raises ConfigError, naming each difference, unless what was measured there holds here."""
        told = [f"{field.name} {there!r}, here {now!r}" for field in fields(CostOrigin) if field.name not in
                ("model", "config") and (there := getattr(self, field.name)) != (now := getattr(here, field.name))]
        if self.config != here.config:
            told.insert(0, f"model {self.model!r}, here {here.model!r} with another config")
        if told:
            raise ConfigError(f"{SETTING}: {path} was measured on something else ({'; '.join(told)}); measure here "
                              "with `xllm profile --json FILE`")


def profile_to_json(origin: CostOrigin, profile: Profile) -> dict[str, Any]:
    """The members that `read_cost_file` reads: observations in columns."""
    moves = {kind: _columns(MOVE_COLUMNS, [move[1:] for move in profile.moves if move.kind == kind])
             for kind in sorted({move.kind for move in profile.moves})}
    return {"format": FORMAT, "origin": asdict(origin),
            "profile": {"steps": _columns(STEP_COLUMNS, [(*step.work, step.seconds) for step in profile.steps]),
                        "moves": moves}}


class CostFile(NamedTuple):
    """What was measured, and on what."""

    origin: CostOrigin
    profile: Profile


def read_cost_file(path: Path) -> CostFile:
    """Raises ConfigError, naming the file and the member, for what `xllm profile` does not write."""
    try:
        data = read_json(path)
    except ModelError as error:
        raise ConfigError(f"{SETTING}: {error}") from None
    try:
        if data.get("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {data.get('format')!r}")
        origin = _origin(data.get("origin"))
        profile = _object("profile", data.get("profile"), {"steps", "moves"})
        steps = _rows("profile.steps", profile["steps"], STEP_COLUMNS)
        moves = _object("profile.moves", profile["moves"])
        return CostFile(origin, Profile(
            steps=[MeasuredStep(StepWork(*row[:-1]), row[-1]) for row in steps],
            moves=[MeasuredMove(kind, *row) for kind, columns in moves.items()
                   for row in _rows(f"profile.moves.{kind}", columns, MOVE_COLUMNS)]))
    except ValueError as error:
        raise ConfigError(f"{SETTING}: {path} is no file of `xllm profile --json`: {error}") from None


def _origin(data: Any) -> CostOrigin:
    _object("origin", data, {field.name for field in fields(CostOrigin)})
    for name, value in data.items():
        right = (type(value) is int if name in ("num_threads", "tensor_parallel_size")
                 else isinstance(value, str) or (name == "quantization" and value is None))
        if not right:
            raise ValueError(f"origin.{name} cannot be {value!r}")
    return CostOrigin(**data)


def _object(where: str, data: Any, names: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object")
    if names is not None and data.keys() != names:
        raise ValueError(f"{where} must have exactly these members: {', '.join(sorted(names))}")
    return data


def _columns(names: tuple[str, ...], rows: list[tuple[float, ...]]) -> dict[str, list[float]]:
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def _rows(where: str, data: Any, names: tuple[str, ...]) -> list[tuple[float, ...]]:
    _object(where, data, set(names))
    for name in names:
        low, high = (LEAST_S, MOST_S) if name == "seconds" else (0.0, MOST)
        column = data[name]
        if not isinstance(column, list) or not all(type(value) in (int, float) and low <= value <= high
                                                   for value in column):
            raise ValueError(f"{where}.{name} must be a list of numbers, each {low:g} to {high:g}")
    if len({len(data[name]) for name in names}) > 1 or len(data["seconds"]) > MOST_ENTRIES:
        raise ValueError(f"the lists of {where} must be equally long, with at most {MOST_ENTRIES} numbers each")
    return list(zip(*(data[name] for name in names), strict=True))
