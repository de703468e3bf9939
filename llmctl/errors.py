"""What a user can see going wrong: each error knows its exit code, HTTP status and the fix to try.

Every error a user can cause is an ``LlmctlError``; the CLI prints it as one line and exits with
``exit_code``, the HTTP app answers ``http_status`` with OpenAI's error shape (``type``, ``code``).
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes, shared by all subcommands.

    ``USAGE``: what was typed can mean nothing here, be it an option, one that the model or engine does not honour among
    them, or a name that no model has (nothing is there, or no checkpoint and no engine). ``RUNTIME``: it was understood
    and failed, as a model does that is damaged or not supported. A command that starts a server ends as that does.
    """

    OK = 0
    RUNTIME = 1
    USAGE = 2
    FAILED_REQUESTS = 3
    SLO_MISSED = 4
    REGRESSION = 5
    INCONCLUSIVE = 6
    INTERRUPTED = 130


def one_line(text: str) -> str:
    """A text without line breaks, and without what a terminal would obey or UTF-8 cannot say: that is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


class LlmctlError(Exception):
    """Base of every user-visible error.

    Args:
        message: what is wrong, what was expected and what was found; made one line, whatever it quotes.
        fix: what the user can do about it (a command where possible); made one line.
        param: the option or request field at fault, if there is one.

    Attributes:
        retry_after: whole seconds after which the client may try again; None: nothing is known.
    """

    exit_code: ExitCode = ExitCode.RUNTIME
    http_status: int = 500
    type: str = "server_error"
    code: str | None = None
    retry_after: int | None = None

    def __init__(self, message: str, *, fix: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = one_line(message)
        self.fix = one_line(fix) if fix else fix
        self.param = param

    def __str__(self) -> str:
        return f"{self.message} ({self.fix})" if self.fix else self.message


class UsageError(LlmctlError, ValueError):
    """An option, config key or request field that cannot be honoured."""

    exit_code = ExitCode.USAGE
    http_status = 400
    type = "invalid_request_error"


class RequestError(UsageError):
    """An API request that is malformed or can never be served."""


class PermissionDeniedError(RequestError):
    """What this client may not ask for."""

    http_status = 403
    type = "permission_error"
    code = "permission_denied"


class ModelNotFoundError(UsageError):
    """No such model, checkpoint folder, engine or adapter."""

    http_status = 404
    code = "model_not_found"


class CheckpointError(LlmctlError, ValueError):
    """A checkpoint that is damaged, incomplete or in a layout that is not understood."""


class UnsupportedModelError(CheckpointError):
    """A model family, quantization scheme or option that this version cannot run."""


class EngineLoadError(LlmctlError, ValueError):
    """An engine folder that must not be loaded here; ``fix`` names the rebuild command."""


class EngineOptionError(EngineLoadError):
    """An option that an engine does not honour, as it was built; ``fix`` names the rebuild command, if that helps."""

    exit_code = ExitCode.USAGE


class MissingPackageError(LlmctlError):
    """A Python package that an extra brings and that is not installed; ``fix`` is the command that installs it."""

    code = "missing_package"


class CompileError(LlmctlError):
    """A kernel failed to compile, or no compiler was found."""


class DeviceError(LlmctlError):
    """A GPU, its driver or what drives it from Python that is missing, unfit or failing; ``fix`` says what to do."""

    code = "device_error"


class DeviceMemoryError(DeviceError):
    """A GPU whose memory is spent: by this engine's own needs, or held by other processes."""


class DeviceLostError(DeviceError):
    """A GPU that failed in the middle of the work: nothing that was on it can be trusted or used any more."""


class HostMemoryError(LlmctlError):
    """The machine, or the limit on this process, has no memory left for what is to be done."""

    code = "out_of_memory"


class CapacityError(RequestError):
    """A request or setting that can never fit: context length, KV cache or memory."""

    code = "context_length_exceeded"


class OverloadError(LlmctlError):
    """Refused for now: there is more to do than is done in time."""

    http_status = 429
    type = "rate_limit_error"
    retry_after = 1


class QueueFullError(OverloadError):
    """Admission refused: too many requests are waiting."""

    code = "queue_full"


class DeadlineUnreachableError(OverloadError):
    """Admission refused: by what was measured, the first token would come after its deadline."""

    code = "deadline_unreachable"


class DeadlineMissedError(OverloadError):
    """The deadline of the first token passed while the request waited."""

    code = "deadline_missed"


class NotReadyError(LlmctlError):
    """The engine is starting, draining or dead."""

    http_status = 503
    type = "service_unavailable"
    code = "not_ready"


class AdapterUnavailableError(LlmctlError):
    """The files of an adapter that is offered cannot be read again, or are not those that were loaded."""

    http_status = 503
    type = "service_unavailable"
    code = "adapter_unavailable"


_MEMORY_FIX = "free memory, choose less of it, or raise the limit (ulimit -v, the container's)"
# How libraries say it: a loader that cannot map them, an allocator, a C++ runtime.
_OUT_OF_MEMORY = ("failed to map segment", "cannot allocate memory", "can't allocate memory", "bad_alloc")
_NO_THREAD = "can't start new thread"


def resource_error(error: BaseException) -> LlmctlError | None:
    """An exception that means that memory or threads are spent, as an error that says so; None for any other."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _OUT_OF_MEMORY):
        return HostMemoryError("out of memory" + (f": {text}" if text else ""), fix=_MEMORY_FIX)
    if isinstance(error, RuntimeError) and _NO_THREAD in text:
        return HostMemoryError(f"no more threads: {text}", fix="raise the limit (ulimit -u, ulimit -v)")
    return None
