"""From a request's body to what the engine takes: prompts as token ids, and ``SamplingParams``.

Everything that can be refused without the engine is refused here, before a response has begun.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from llmctl.engine.sampling_params import (
    SamplingParams,
    bad_word_ids,
    check_bad_words,
    check_biases,
    check_known,
    short_value,
    unknown_id,
)
from llmctl.errors import CapacityError, CheckpointError, RequestError
from llmctl.serving.final_message import mark_end, up_to_mark
from llmctl.serving.limits import Limits
from llmctl.serving.protocol import (
    OWN_VARIABLES,
    ChatCompletionRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Prompts,
    TokenizeChatRequest,
    TokenizeRequest,
    given_prompts,
)
from llmctl.serving.sampling_defaults import DEFAULTABLE
from llmctl.serving.sampling_fields import check_scores, logit_bias_of
from llmctl.serving.structured_fields import grammar_of
from llmctl.serving.text_workers import INLINE_BYTES, TextWorkers
from llmctl.serving.tools.generic_prompt import with_tools
from llmctl.serving.tools.history import template_message
from llmctl.serving.tools.support import ToolSupport, ToolUse
from llmctl.text.chat_template import ChatTemplate
from llmctl.text.template_budget import TemplateLimitError, at_most
from llmctl.text.tokenizer import Tokenizer

T = TypeVar("T")

# What a word that is to be forbidden costs beside its characters, in characters, and a token that is to be text.
_BYTES_PER_WORD = 64
_BYTES_PER_TOKEN = 4
# Of a template, at a few µs each: a few KB of messages take some hundred.
_INLINE_STEPS = 2000


@dataclass(frozen=True)
class Prompt:
    """One prompt: its ids, and its text when it is known or was asked for (``echo``)."""

    token_ids: list[int]
    text: str | None = None


class Intake:
    """Checks and translates requests for one model.

    Args:
        chat_template: None when the model has none; chat requests are then refused rather than guessed.
        max_model_len: tokens, prompt and output. vocab_size: ids a prompt may hold.
        defaults: sampling parameters used where a request leaves them out; ``max_tokens`` in chats, for completions
            have OpenAI's 16.
        trust_request_template: whether requests may bring a template of their own.
        tools: how tools are shown and their calls found; by default the template's way.

    Attributes:
        workers: do what takes long of this model's requests. limits: what is refused by its counts alone.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        *,
        max_model_len: int,
        vocab_size: int,
        defaults: Mapping[str, Any],
        trust_request_template: bool = False,
        tools: ToolSupport | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.limits = Limits(max_model_len, vocab_size, lambda: tokenizer.bounds)
        self._chat_template = chat_template
        self._vocab_size = vocab_size
        self._trust_request_template = trust_request_template
        self._defaults = {name: value for name, value in defaults.items() if name != "max_tokens"}
        self._default_max_tokens: int | None = defaults.get("max_tokens")
        self.tools = tools or ToolSupport.of(tokenizer, chat_template)
        self.workers = TextWorkers()

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be rendered."""
        return self._chat_template is not None

    def tokenizer_info(self) -> dict[str, Any]:
        """The model's ``tokenizer_config.json``, with the special tokens and the chat template that are used."""
        template = {} if self._chat_template is None else {"chat_template": self._chat_template.source}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.tokenizer.config,
            **self.tokenizer.special_tokens,
            **template,
        }

    def _encode(self, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text that fits the context."""
        self.limits.check_fits(text, param)
        ids = self.tokenizer.encode_up_to(self.max_model_len, text, add_special_tokens)
        if isinstance(ids, int):
            raise self.limits.too_long(f"{ids} tokens", param)
        return ids

    async def tokenize(self, body: TokenizeRequest | TokenizeChatRequest, body_bytes: int) -> list[int]:
        """Token ids of what ``/tokenize`` is asked for.

        Raises:
            CapacityError: too long by its bytes. RequestError: as ``render_chat``. QueueFullError.
        """
        if isinstance(body, TokenizeRequest):
            self.limits.check_fits(body.prompt, "prompt")
            return await self.workers.run(body_bytes, lambda: self._tokenize(body))
        return await self._run_chat(body_bytes, lambda: self._tokenize(body))

    def _tokenize(self, body: TokenizeRequest | TokenizeChatRequest) -> list[int]:
        if isinstance(body, TokenizeRequest):
            return self.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
        text = self.render_chat(body)
        self.limits.check_fits(text, "messages")
        return self.tokenizer.encode(text, add_special_tokens=body.add_special_tokens)

    async def last_tokens(self, text: str, count: int) -> list[int]:
        """Token ids of a text's last ``count`` tokens; what is before them may be longer than the context.

        Raises:
            RequestError: none. CapacityError: more than the context. QueueFullError.
        """
        if count > self.max_model_len:
            self.limits.check_fits(text, "prompt")
        ids = (await self.workers.run(len(text), lambda: self.tokenizer.encode(text)))[-count:]
        self.check_prompt(ids, "prompt")
        return ids

    async def token_texts(self, ids: Sequence[int]) -> list[str | None]:
        """The vocabulary's spelling of each token."""
        size = len(ids) * _BYTES_PER_TOKEN
        return await self.workers.run(size, lambda: [self.tokenizer.id_to_token(i) for i in ids])

    async def detokenize(self, body: DetokenizeRequest) -> str:
        """The text of token ids.

        Raises:
            RequestError: an id outside the vocabulary. QueueFullError.
        """
        self._check_tokens(body.tokens)
        size = len(body.tokens) * _BYTES_PER_TOKEN
        return await self.workers.run(size, lambda: self.tokenizer.decode(body.tokens, skip_special_tokens=False))

    def num_sequences(self, body: CompletionRequest | ChatCompletionRequest) -> int:
        """How many sequences a request asks for: its prompts times ``n``. Nothing is made for it.

        Raises:
            RequestError: ``n`` out of range.
        """
        samples = SamplingParams(n=1 if body.n is None else body.n).n
        return samples * (len(given_prompts(body.prompt)) if isinstance(body, CompletionRequest) else 1)

    async def completion_prompts(self, body: CompletionRequest) -> list[Prompt]:
        """The prompts of a completion request, in order.

        Raises:
            RequestError, CapacityError, QueueFullError: as ``prompts``.
        """
        special = body.add_special_tokens
        return await self.prompts(body.prompt, "prompt", add_special_tokens=special, with_texts=bool(body.echo))

    async def prompts(
        self, given: Prompts, param: str, *, add_special_tokens: bool, with_texts: bool = False
    ) -> list[Prompt]:
        """The prompts that a field ``param`` gives, in order.

        Args:
            with_texts: of prompts that are token ids, too.

        Raises:
            RequestError: none, an empty one, or ids that the model does not have. CapacityError: one is too long.
            QueueFullError.
        """
        items = given_prompts(given)
        if not items:
            raise RequestError(f"{param}: expected at least one prompt, found an empty list", param=param)

        def made(item: str | list[int]) -> Prompt:
            if isinstance(item, list):
                return Prompt(item, self.tokenizer.decode(item) if with_texts else None)
            ids = self._encode(item, param, add_special_tokens=add_special_tokens)
            self.check_prompt(ids, param)
            return Prompt(ids, item)

        size = sum(self._check_given(item, param, with_texts=with_texts) for item in items)
        return await self.workers.run(size, lambda: [made(item) for item in items])

    def _check_given(self, item: str | list[int], param: str, *, with_texts: bool) -> int:
        """Refuse what needs no tokenizer to be refused; how many bytes of text it is for the tokenizer."""
        if isinstance(item, str):
            self.limits.check_fits(item, param)
            return len(item)
        self.check_prompt(item, param)
        return len(item) * _BYTES_PER_TOKEN if with_texts else 0

    def check_ids(self, name: str, found: Any) -> None:
        """Refuse a field of a body that holds token ids which the model does not have, before more is made of it.

        Args:
            found: as ``CheckIds``.

        Raises:
            RequestError, CapacityError: as the methods that make something of the field.
        """
        if not found:
            return
        if name in ("prompt", "input") and isinstance(found, list):
            if isinstance(found[0], int | list):
                for ids in given_prompts(found):
                    self.check_prompt(ids, name)
        elif name == "tokens":
            self._check_tokens(found)
        elif name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            if name == "logit_bias":
                found, biases = found
                check_biases(found, biases)
            self.limits.check_ids(name, len(found))
            check_known(name, found, self._vocab_size)

    def _check_tokens(self, ids: Sequence[int]) -> None:
        if unknown_id(ids, self._vocab_size) is not None:
            raise RequestError("tokens: an id is outside the vocabulary", param="tokens")

    def check_prompt(self, ids: Sequence[int], param: str) -> None:
        """Refuse an empty prompt, ids that the model does not have, and what does not fit the context.

        Raises:
            RequestError, CapacityError.
        """
        if not ids:
            raise RequestError(f"{param}: expected at least one token, found none", param=param)
        if len(ids) > self.max_model_len:
            raise self.limits.too_long(f"{len(ids)} tokens", param)
        check_known(param, ids, self._vocab_size)

    def render_chat(self, body: ChatRequest) -> str:
        """The prompt text of a chat.

        Raises:
            RequestError: no template, a part that is not text, or a template that refuses the messages.
        """
        template = self._template_of(body)
        extra = dict(body.chat_template_kwargs or {})
        for name in OWN_VARIABLES & extra.keys():
            raise RequestError(
                f"chat_template_kwargs: expected variables of the template's own, found '{name}'",
                fix=f"set the request's field '{name}'",
                param="chat_template_kwargs",
            )
        if body.documents is not None:
            extra["documents"] = body.documents
        as_strings = self.tools.traits.string_arguments and not self.tools.generic
        messages = [template_message(m, i, string_arguments=as_strings) for i, m in enumerate(body.messages)]
        tools = self.tools.tools_shown(body)
        if self.tools.generic:
            messages, tools = with_tools(messages, tools), None
        going_on = body.continue_final_message
        if going_on:
            mark_end(messages[-1], body)
        text = template.render(
            messages,
            add_generation_prompt=body.add_generation_prompt and not going_on,
            tools=tools,
            **extra,
        )
        return up_to_mark(text) if going_on else text

    def _template_of(self, body: ChatRequest) -> ChatTemplate:
        """The request's own template, where such are trusted, or the model's."""
        if body.chat_template is not None:
            self._check_template_trusted()
            try:
                return ChatTemplate(body.chat_template, self.tokenizer.special_tokens)
            except CheckpointError as error:
                raise RequestError(f"chat_template: {error.message}", param="chat_template") from error
        if self._chat_template is None:
            raise RequestError(
                "this model has no chat template",
                fix="start the server with --chat-template FILE, or use /v1/completions",
                param="messages",
            )
        return self._chat_template

    def _check_template_trusted(self) -> None:
        if not self._trust_request_template:
            raise RequestError(
                "chat_template: the server was not started with --trust-request-chat-template", param="chat_template"
            )

    async def chat_prompt(self, body: ChatRequest, body_bytes: int) -> Prompt:
        """The prompt of a chat, as text and ids.

        Args:
            body_bytes: bytes of the request, more or less what its rendering takes.

        Raises:
            RequestError: as ``render_chat``. CapacityError: too long. QueueFullError.
        """
        return await self._run_chat(body_bytes, lambda: self._chat_prompt(body))

    async def _run_chat(self, body_bytes: int, work: Callable[[], T]) -> T:
        """Do work that renders a chat; in a thread too if the template makes much of little."""
        if body_bytes <= INLINE_BYTES:
            try:
                with at_most(_INLINE_STEPS):
                    return work()
            except RequestError as error:
                if not isinstance(error.__cause__, TemplateLimitError):
                    raise
        return await self.workers.run(max(body_bytes, INLINE_BYTES + 1), work)

    def _chat_prompt(self, body: ChatRequest) -> Prompt:
        text = self.render_chat(body)
        ids = self._encode(text, "messages", add_special_tokens=body.add_special_tokens)
        self.check_prompt(ids, "messages")
        return Prompt(ids, text)

    async def completion_params(self, body: CompletionRequest) -> SamplingParams:
        """Sampling parameters of a completion request, but for ``max_tokens``, which ``fit_completion`` adds.

        Raises:
            RequestError: a field that is out of range or cannot be honoured. QueueFullError.
        """
        return await self._params(body)

    def fit_completion(
        self, params: SamplingParams, body: CompletionRequest, prompts: Sequence[Prompt]
    ) -> SamplingParams:
        """The parameters with ``max_tokens``, which fit the longest prompt, and what an echo needs to know of prompts.

        Raises:
            CapacityError: too long. RequestError: ``min_tokens`` is more than that, or too many log-probabilities.
        """
        longest = max(len(p.token_ids) for p in prompts)
        wanted = 16 if body.max_tokens is None else body.max_tokens
        tops = [top for top in (params.prompt_logprobs, params.logprobs if body.echo else None) if top is not None]
        params = replace(
            params,
            max_tokens=self._max_tokens(wanted, longest, "max_tokens"),
            prompt_logprobs=max(tops, default=None),
        )
        check_scores(params, sum(len(p.token_ids) for p in prompts))
        return params

    async def chat_params(self, body: ChatCompletionRequest, use: ToolUse) -> SamplingParams:
        """Sampling parameters of a chat request, but for ``max_tokens``, which ``fit_chat`` adds.

        Args:
            use: what it asks for of tools, see ``ToolSupport.use``.

        Raises:
            RequestError: a field that is out of range or cannot be honoured. QueueFullError.
        """
        params = await self._params(body)
        if use.markers:
            params = replace(params, shown_special_token_ids=use.markers)
        if use.grammar is None:
            return params
        # A response format is of the message's text, and a message of calls that must be made has none.
        if params.grammar is not None and params.grammar.param != "response_format":
            raise RequestError(
                f"expected one description of the output, found {params.grammar.param} and {use.grammar.param}",
                param=use.grammar.param,
            )
        return replace(params, grammar=use.grammar)

    def fit_chat(
        self, params: SamplingParams, body: ChatCompletionRequest, prompt: Prompt, use: ToolUse
    ) -> SamplingParams:
        """The parameters with ``max_tokens``, which fit the prompt, and what calls are held to.

        Raises:
            CapacityError: too long. RequestError: as ``fit_completion``.
        """
        param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        wanted = getattr(body, param)
        check_scores(params, len(prompt.token_ids))
        if body.clips_max_tokens and wanted is not None:
            wanted = min(wanted, max(1, self.max_model_len - len(prompt.token_ids)))
        made = self._max_tokens(wanted, len(prompt.token_ids), param)
        if wanted is None and self._default_max_tokens is not None:
            made = min(made, self._default_max_tokens)
        return replace(params, max_tokens=made, grammar=use.answer_grammar(params.grammar, prompt.text))

    def _max_tokens(self, wanted: int | None, prompt_tokens: int, param: str) -> int:
        room = self.max_model_len - prompt_tokens
        if wanted == -1:  # llama.cpp's word for no limit
            wanted = None
        if wanted is None and room > 0:
            return room
        needed = 1 if wanted is None else wanted
        if needed > room:
            raise CapacityError(
                f"this model's maximum context length is {self.max_model_len} tokens, but "
                f"{short_value(prompt_tokens + needed)} were requested ({prompt_tokens} in the prompt, "
                f"{short_value(needed)} in the completion)",
                fix=f"shorten the prompt or lower {param}",
                param=param,
            )
        return needed

    def check_scalars(self, body: CompletionRequest | ChatCompletionRequest) -> None:
        """Refuse a request by those of its fields that are single values.

        Raises:
            RequestError: one is out of range, or cannot be honoured beside another.
        """
        self._scalars(body)
        if isinstance(body, ChatCompletionRequest) and body.chat_template is not None:
            self._check_template_trusted()

    def _scalars(self, body: CompletionRequest | ChatCompletionRequest) -> SamplingParams:
        if isinstance(body, CompletionRequest):
            if body.best_of is not None and body.best_of != (body.n or 1):
                raise RequestError("best_of: not supported; use n", param="best_of")
            logprobs = body.logprobs
        else:
            if body.top_logprobs and not body.logprobs:
                raise RequestError("top_logprobs: needs logprobs to be true", param="top_logprobs")
            logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if body.prompt_logprobs is not None and body.stream:
            raise RequestError(
                "prompt_logprobs: not available with stream",
                fix="leave stream out; of completions, echo with logprobs has them in a stream, too",
                param="prompt_logprobs",
            )
        values: dict[str, Any] = dict(self._defaults)
        plain = (*DEFAULTABLE, "n", "presence_penalty", "frequency_penalty", "seed", "min_tokens", "ignore_eos")
        for name in (*plain, "skip_special_tokens", "include_stop_str_in_output"):
            value = getattr(body, name)
            if value is not None:
                values[name] = value
        params = SamplingParams(**values, logprobs=logprobs, prompt_logprobs=body.prompt_logprobs)
        return replace(params, top_k=min(params.top_k, self._vocab_size))

    async def _params(self, body: CompletionRequest | ChatCompletionRequest) -> SamplingParams:
        scalars = self._scalars(body)
        grammar = grammar_of(body)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self.limits.check_ids(name, len(getattr(body, name) or ()))
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        params = replace(
            scalars,
            stop=stop,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
            logit_bias=logit_bias_of(body.logit_bias),
            grammar=grammar,
        )
        params.check_vocab(self._vocab_size)
        return await self._without_bad_words(params, body.bad_words) if body.bad_words else params

    async def _without_bad_words(self, params: SamplingParams, words: Sequence[str]) -> SamplingParams:
        check_bad_words(words)
        size = 2 * sum(len(word) + _BYTES_PER_WORD for word in words)
        return await self.workers.run(size, lambda: self._with_bad_words(params, words))

    def _with_bad_words(self, params: SamplingParams, words: Sequence[str]) -> SamplingParams:
        made = replace(params, bad_words=bad_word_ids(self.tokenizer, words))
        made.check_vocab(self._vocab_size)
        return made
