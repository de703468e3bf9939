"""What crosses between the API process and the worker process: msgspec structs as MessagePack.

The worker sends ONE ``StepMessage`` per engine step with all requests' tokens in it, and one ``Scheduled`` before a
step with new requests; text never crosses. The engine's own records travel as they are.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from llmctl.engine.deadline import NO_DEADLINE, Deadline
from llmctl.engine.llm_engine import EngineStats, TokenOutput
from llmctl.engine.pooling import Pooling
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import ExitCode, LlmctlError


class WireRequest(msgspec.Struct, array_like=True, frozen=True):
    """One sequence of a ``tenant``. ``arrival`` is on ``time.monotonic``, which all processes of a machine share.

    ``adapter_id``: the adapter it runs with, which the worker was told of before; None: none.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str | None
    arrival: float
    tenant: str = ""
    deadline: Deadline = NO_DEADLINE
    pooling: Pooling | None = None
    adapter_id: str | None = None


class AddRequests(msgspec.Struct, tag="add", array_like=True, frozen=True):
    """Admit the sequences of one HTTP request, all or none."""

    requests: list[WireRequest]


class AbortRequests(msgspec.Struct, tag="abort", array_like=True, frozen=True):
    """Drop these requests and free their blocks; unknown ids are ignored."""

    request_ids: list[str]


class LoadAdapter(msgspec.Struct, tag="load_adapter", array_like=True, frozen=True):
    """Read an adapter for the first time; ``AdapterLoaded`` or ``AdapterRefused`` follows."""

    name: str
    path: str


class KnowAdapter(msgspec.Struct, tag="know_adapter", array_like=True, frozen=True):
    """Where an adapter that was read before is to be read again when it is wanted; nothing follows."""

    adapter_id: str
    path: str


class ForgetAdapter(msgspec.Struct, tag="forget_adapter", array_like=True, frozen=True):
    """No more requests will come for an adapter."""

    adapter_id: str


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True, frozen=True):
    """Leave the engine loop and exit 0."""


Command = AddRequests | AbortRequests | LoadAdapter | KnowAdapter | ForgetAdapter | Shutdown


class ErrorInfo(msgspec.Struct, array_like=True, frozen=True):
    """An ``LlmctlError`` in transit."""

    message: str
    fix: str | None
    param: str | None
    http_status: int
    type: str
    code: str | None
    exit_code: int

    @classmethod
    def of(cls, error: LlmctlError) -> ErrorInfo:
        """The error, ready to be sent."""
        return cls(
            error.message, error.fix, error.param, error.http_status, error.type, error.code, int(error.exit_code)
        )

    def error(self) -> LlmctlError:
        """The error, on the other side: same text, status, type, code and exit code."""
        error = LlmctlError(self.message, fix=self.fix, param=self.param)
        error.http_status, error.type, error.code = self.http_status, self.type, self.code
        error.exit_code = ExitCode(self.exit_code)
        return error


class Progress(msgspec.Struct, tag="progress", array_like=True, frozen=True):
    """What the worker is doing before it is ready, for ``/ready`` and the terminal."""

    text: str


class Located(msgspec.Struct, tag="located", array_like=True, frozen=True):
    """The engine folder is known (built if it had to be); the API process may read the tokenizer from it."""

    engine_path: str


class EngineInfo(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """The worker is ready. Sizes in tokens, blocks and bytes; the strings are for people.

    ``memory``: rows of the memory plan as it came to be (``artifact.memory_table``); ``memory_note``: where the budget
    comes from; ``own_memory``: the device has memory of its own. ``kernels``: which build of the target's kernels runs
    and why not a faster one; empty where the target's name says it. ``kv_tokens``: what the KV
    cache holds, in sequences of ``max_model_len``.
    """

    model_name: str
    family: str
    target: str
    quantization: str
    dtype: str
    max_model_len: int
    block_size: int
    num_blocks: int
    vocab_size: int
    hidden_size: int
    weight_bytes: int
    kv_cache_bytes: int
    kv_cache_dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int
    memory: list[list[str]] = []
    memory_note: str = ""
    kernels: str = ""
    own_memory: bool = False
    kv_tokens: int = 0


class WorkerFailed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    """The worker could not start, or cannot go on; it exits after this."""

    error: ErrorInfo


class Refused(msgspec.Struct, array_like=True, frozen=True):
    """The scheduler refused these sequences (one HTTP request's)."""

    request_ids: list[str]
    error: ErrorInfo


class StepMessage(msgspec.Struct, tag="step", array_like=True, frozen=True):
    """Everything that happened since the last one, and the engine's state after: a step or a wait, aborts, refusals.

    ``busy_seconds``: total wall time, since the start, in which the worker did not wait for requests.
    ``waiting``: of the requests that came since, those that will not be refused any more and have no output yet.
    """

    outputs: list[TokenOutput]
    stats: EngineStats
    busy_seconds: float
    refused: list[Refused] = []
    waiting: list[str] = []


class Scheduled(msgspec.Struct, tag="scheduled", array_like=True, frozen=True):
    """These requests are in a step for the first time; sent before it is executed, which may be the worker's end."""

    request_ids: list[str]


class AdapterLoaded(msgspec.Struct, tag="adapter_loaded", array_like=True, frozen=True):
    """An adapter is in memory. ``adapter_id``: of its content."""

    name: str
    adapter_id: str


class AdapterRefused(msgspec.Struct, tag="adapter_refused", array_like=True, frozen=True):
    """An adapter cannot be served."""

    name: str
    error: ErrorInfo


Event = AdapterLoaded | AdapterRefused | Scheduled | Progress | Located | EngineInfo | WorkerFailed | StepMessage


def _from_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    raise NotImplementedError(f"cannot be sent: {type(value).__name__}")


def _to_array(_: type, value: Any) -> Any:
    dtype, shape, data = value
    return np.frombuffer(data, dtype).reshape(shape)


encode = msgspec.msgpack.Encoder(enc_hook=_from_array).encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event, dec_hook=_to_array).decode
