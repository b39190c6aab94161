"""What the engine and its workers say to each other. One type is one message; `message_codec.py` makes bytes of them.

Plain values only (numbers, text, numpy arrays, dataclasses of them), so that every message can cross into another
process. Down go the commands: every rank gets the same ones in the same order. Up come the reports; what every rank
has to confirm (`gather.py`) reaches the engine once, when all ranks have. A plan (`xllm/step.py:ScheduleOutput`) is the
command to compute its step; the `StepOutput`s (or `Settled`s) come in the order of the steps.

Names that are kept for what is to come: Profile, Encode (media), Publish (KV to other instances), PutExperts.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from xllm.config import EngineConfig
from xllm.kv.moves import Move, MoveDone, TierFacts
from xllm.pooling import PoolingDefaults
from xllm.stats import GraphStats, ThreadStats
from xllm.step import ScheduleOutput, StepCheck, StepOutput
from xllm.structured.spec import StructuredOutput

# --- down


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load the model and get ready; `Loaded` answers, with any number of `LoadProgress`s before it."""

    config: EngineConfig


@dataclass(frozen=True, slots=True)
class Settle:
    """Asks for the results of the oldest step now: where it is only queued on the device, read them."""


@dataclass(frozen=True, slots=True)
class Foreground:
    """Says whether steps run: if they do, moves between the KV tiers that no request waits for are slowed down."""

    steps_run: bool


@dataclass(frozen=True, slots=True)
class EndLanding:
    """Let nobody write any more for the landing (`Move` on the lane LAND) of this number; its `MoveDone` follows.
    Nothing happens for one that is over."""

    number: int


@dataclass(frozen=True, slots=True)
class PutGrammar:
    """Compile a grammar, unless it is compiled already; steps with rows that need it come later. `GrammarDone`
    answers."""

    spec: StructuredOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadAdapter:
    """Read an adapter's files (PEFT format) beside the steps and keep it under `number`; `AdapterRead` answers."""

    number: int
    folder: str
    max_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PutAdapter:
    """Fill a slot with the adapter that was read under `number`, or empty it (None); without a slot, forget what was
    read. No open request uses the slot."""

    slot: int | None
    number: int | None


@dataclass(frozen=True, slots=True)
class Sleep:
    """Free the KV cache and the graphs, and the weights too unless they are kept. `Done` answers."""

    keep_weights: bool


@dataclass(frozen=True, slots=True)
class Wake:
    """Undo `Sleep`. `Done` answers."""


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End everything that runs beside the steps, then the worker. `Done` answers."""


# --- up


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Loading goes on: `share` of `name` is done."""

    name: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where and how a rank computes. device_name: as its maker calls it. num_threads: 0 where those are not the host's
    cores. weights_bytes: 0 for random weights. kv_bytes: what the KV cache may take. kv_token_bytes: what a token of a
    full block takes there. advice: what would be faster, if anything is known."""

    device: str = ""
    device_name: str = ""
    dtype: str = ""
    kv_dtype: str = ""
    num_threads: int = 0
    weights_bytes: int = 0
    kv_bytes: int = 0
    kv_token_bytes: int = 0
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The model is loaded. These facts hold as long as the worker lives.

    config: resolved. model_path: the local folder. num_blocks: KV blocks on the device, of which the first
    `num_reserved_blocks` are the device's own. queues_steps: the device works on its own, so that a step may be only
    queued when the next message comes (`Settle`). generates: False if there is no head, so that embeddings alone can be
    had. pooling: what an embedding is unless a request says it. tiers: the memory below the device, if there is any.
    """

    config: EngineConfig
    model_path: str
    vocab_size: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    num_reserved_blocks: int
    queues_steps: bool
    pooling: PoolingDefaults
    generates: bool = True
    tiers: TierFacts | None = None
    placement: Placement = field(default_factory=Placement)


@dataclass(frozen=True, slots=True)
class StepBegun:
    """A rank that shares a model is about to compute a step, and has exchanged nothing for it yet: all must say the
    same of each step. num_rows, num_tokens: of the batch, drafts included. graph: the key of its graph, with tokens x
    rows; "": it has none. inputs: crc32 of the batch's token ids, positions and lengths."""

    step: int
    num_rows: int
    num_tokens: int
    graph: str
    inputs: int


@dataclass(frozen=True, slots=True)
class Settled:
    """A rank other than the first has done a step. check: with XLLM_CHECK=1. drawn: `digest_drawn` of its tokens."""

    step: int
    check: StepCheck | None = None
    drawn: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """A command could not be carried out; kind: the name of the error's class.

    If the command has no answer type of its own, the worker must not be used any more.
    """

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class GrammarDone:
    """A grammar was compiled. error: why it cannot be, else None."""

    spec: StructuredOutput
    error: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterRead:
    """An adapter's files were read. digest: of the files; the KV of requests with the adapter depends on it."""

    number: int
    digest: str = ""
    error: Failed | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The message of type `what` was carried out, or could not be."""

    what: str
    error: Failed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """A worker's counters. A rank in a process of its own sends them about twice a second, as a sign of life too.

    graphs: None without a graph mode. threads: None on an accelerator. tier_misses: reads of blocks that were not
    good, by tier and kind. exchange_s: for how long it has been waiting in an exchange with other ranks; 0.0: it is in
    none.
    """

    graphs: GraphStats | None = None
    threads: ThreadStats | None = None
    tier_misses: dict[str, dict[str, int]] = field(default_factory=dict)
    exchange_s: float = 0.0


def digest_drawn(output: StepOutput) -> int:
    """crc32 of the tokens that a step drew."""
    return zlib.crc32(output.token_ids_SR.tobytes())


WorkerCommand = (Load | ScheduleOutput | Settle | Move | Foreground | EndLanding | PutGrammar | ReadAdapter | PutAdapter
                 | Sleep | Wake | StopWorker)
WorkerReport = (LoadProgress | Loaded | StepBegun | StepOutput | Settled | MoveDone | Failed | GrammarDone | AdapterRead
                | Done | WorkerStats)
