"""What the endpoints share: the engine client, the metrics, and the model once it is there."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from starlette.requests import Request

from llmctl.config import ServeConfig, parse_bytes
from llmctl.engine.deadline import Deadline
from llmctl.errors import CheckpointError, ModelNotFoundError
from llmctl.serving.adapters import ServedAdapter, shown_names
from llmctl.serving.client import AsyncEngineClient
from llmctl.serving.engine_card import EngineCard
from llmctl.serving.intake import Intake
from llmctl.serving.keys import ServerKeys
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.observers import RequestObservers
from llmctl.serving.redaction import Redactor
from llmctl.serving.sampling_defaults import SamplingDefaults, sampling_defaults
from llmctl.serving.tools.support import ToolSupport
from llmctl.serving.wire import EngineInfo
from llmctl.text.chat_template import ChatTemplate
from llmctl.text.tokenizer import Tokenizer

# A token is a few bytes of text; requests bring escapes, tool schemas, token ids, and many prompts at once.
BODY_BYTES_PER_TOKEN = 1024
LEAST_BODY_BYTES = 2**20
MOST_BODY_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Model:
    """The served model: its name and what translates requests for it. ``adapter``: what it is asked for with."""

    name: str
    intake: Intake
    info: EngineInfo
    defaults: SamplingDefaults
    adapter: ServedAdapter | None = None

    @classmethod
    def from_folder(cls, name: str, folder: Path, tokenizer: Tokenizer, info: EngineInfo, config: ServeConfig) -> Model:
        """The Model of an engine folder, with the template and the sampling defaults of ``config``.

        Raises:
            CheckpointError: the template file cannot be read or is not a template. UsageError: as
                ``sampling_defaults``.
        """
        template = tokenizer.chat_template
        if config.chat_template is not None:
            template = _read_template(Path(config.chat_template), tokenizer)
        defaults = sampling_defaults(config.generation_config, folder)
        intake = Intake(
            tokenizer,
            template,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            defaults=defaults.values,
            trust_request_template=config.trust_request_chat_template,
            tools=ToolSupport.of(
                tokenizer,
                template,
                tool_call_parser=config.tool_call_parser,
                reasoning_parser=config.reasoning_parser,
                tool_template=config.tool_template,
            ),
        )
        return cls(name, intake, info, defaults)


@dataclass
class ServerContext:
    """State of one server. ``model()`` is for requests, and refuses while the engine cannot take them.

    Attributes:
        names: of the model; the first is the one that answers bear.
        deadline: of requests that bring none.
        description: the API's, once somebody has asked for it; ``describing``: it is being made.
    """

    config: ServeConfig
    names: tuple[str, ...]
    client: AsyncEngineClient
    metrics: ServerMetrics
    keys: ServerKeys
    redactor: Redactor
    observers: RequestObservers = field(default_factory=RequestObservers)
    loaded: Model | None = None
    engine_card: EngineCard = field(default_factory=EngineCard)
    created: int = field(default_factory=lambda: int(time.time()))
    deadline: Deadline = field(init=False)
    description: bytes | None = None
    describing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.deadline = Deadline.parse(self.config.deadline, "--deadline")

    def model(self, name: str | None = None) -> Model:
        """The model, with the adapter that ``name`` is one of.

        Raises:
            NotReadyError: starting, draining, or dead, with the reason.
        """
        self.client.worker.check_admitting()
        assert self.loaded is not None, "the client admits requests only once the model is there"
        adapter = self.client.adapters.find(name)
        return self.loaded if adapter is None else replace(self.loaded, name=adapter.name, adapter=adapter)

    def max_body_bytes(self) -> int:
        """The largest request body: ``--max-body``, or what the model's context is worth."""
        if self.config.max_body is not None:
            return parse_bytes(self.config.max_body, param="max_body")
        tokens = 0 if self.loaded is None else self.loaded.info.max_model_len
        return min(max(tokens * BODY_BYTES_PER_TOKEN, LEAST_BODY_BYTES), MOST_BODY_BYTES)

    def check_name(self, name: str | None) -> None:
        """Refuse a name that is neither the model's nor an adapter's; a request without one means the model.

        Raises:
            ModelNotFoundError.
        """
        if name is None or name in self.names or self.client.adapters.find(name) is not None:
            return
        shown = shown_names([*self.names, *(adapter.name for adapter in self.client.adapters)])
        raise ModelNotFoundError(f"the model '{name}' does not exist; this server has: {shown}", param="model")


def _read_template(path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"--chat-template {path}: {reason}", param="chat_template") from error
    return ChatTemplate(source, tokenizer.special_tokens)


def context_of(request: Request) -> ServerContext:
    """The ServerContext of the app that a request came to."""
    context: ServerContext = request.app.state.context
    return context
