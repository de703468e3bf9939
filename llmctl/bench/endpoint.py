"""A server's address, and what a bench asks it beside the load: how many tokens a text has."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llmctl.bench.workloads import TokenCounter
from llmctl.errors import LlmctlError, UsageError

if TYPE_CHECKING:
    import aiohttp

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BACKENDS = {"openai": COMPLETIONS, "vllm": COMPLETIONS, "openai-chat": CHAT}
_PROBE_TIMEOUT = 10.0
_TOKENIZE_AT_ONCE = 8


@dataclass(frozen=True)
class Endpoint:
    """A server's address. ``path`` is the endpoint under test."""

    base_url: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    verify_tls: bool = True

    @property
    def chat(self) -> bool:
        """Whether the endpoint takes messages."""
        return self.path.rstrip("/").endswith("/chat/completions")

    @property
    def url(self) -> str:
        """Full address of the endpoint under test."""
        return self.base_url + self.path


def make_endpoint(
    base_url: str, path: str | None, backend: str | None, api_key: str | None, headers: Sequence[str], verify_tls: bool
) -> Endpoint:
    """An Endpoint from options; ``http://host/v1`` is taken as ``http://host``.

    Raises:
        UsageError: no http(s) URL, an unknown backend, a header that is not KEY=VALUE, or such a key.
    """
    if api_key is not None and not api_key.isprintable():
        raise UsageError(
            "--api-key: expected printable characters, found others, such as the end of a line of a CRLF file",
            fix="the key alone: tr -d '\\r\\n' < FILE",
            param="api_key",
        )
    if backend is not None and backend not in BACKENDS:
        raise UsageError(f"--backend '{backend}': expected one of {', '.join(BACKENDS)}", param="backend")
    root = base_url.rstrip("/").removesuffix("/v1")
    if not _is_server_url(root):
        raise UsageError(f"--base-url '{base_url}': expected http://HOST:PORT or https://HOST", param="base_url")
    chosen = path or BACKENDS[backend or "openai"]
    pairs = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    for item in headers:
        name, equals, value = item.partition("=")
        if not equals or not name.strip() or not item.isprintable():
            raise UsageError(f"--header '{item}': expected KEY=VALUE", param="header")
        pairs[name.strip()] = value.strip()
    return Endpoint(root, "/" + chosen.lstrip("/"), pairs, verify_tls)


def _is_server_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number or beyond 65535, a broken IPv6 address
        return False


def server_counter(endpoint: Endpoint, model: str) -> TokenCounter | None:
    """Counts tokens through the server's ``/tokenize`` (vLLM's and llmctl's form, or llama.cpp's); None without one."""
    for form in (_vllm_form, _llama_cpp_form):

        def count(texts: Sequence[str], form: Any = form) -> list[int]:
            return asyncio.run(_count(endpoint, [form(text, model, not endpoint.chat) for text in texts]))

        try:
            if count(["river stone"])[0] > 0:
                return count
        except LlmctlError:
            continue
    return None


def _vllm_form(text: str, model: str, special: bool) -> dict[str, object]:
    return {"model": model, "prompt": text, "add_special_tokens": special}


def _llama_cpp_form(text: str, model: str, special: bool) -> dict[str, object]:  # noqa: ARG001
    return {"content": text, "add_special": special}


async def _count(endpoint: Endpoint, bodies: Sequence[Mapping[str, object]]) -> list[int]:
    slots = asyncio.Semaphore(_TOKENIZE_AT_ONCE)

    async def one(session: aiohttp.ClientSession, body: Mapping[str, object]) -> int:
        async with slots:
            status, answer, reason = await call(session, "POST", endpoint.base_url + "/tokenize", body)
        tokens = answer.get("tokens") if status == 200 and isinstance(answer, dict) else None
        if not isinstance(tokens, list):
            raise LlmctlError(f"{endpoint.base_url}/tokenize: {reason or 'no list of tokens in the answer'}")
        return len(tokens)

    async with open_session(endpoint) as session:
        return list(await asyncio.gather(*(one(session, body) for body in bodies)))


def open_session(endpoint: Endpoint) -> aiohttp.ClientSession:
    """For short questions beside the load."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=endpoint.verify_tls),
        timeout=aiohttp.ClientTimeout(total=_PROBE_TIMEOUT),
        headers=dict(endpoint.headers),
    )


async def call(
    session: aiohttp.ClientSession, method: str, url: str, body: Mapping[str, object] | None = None
) -> tuple[int, Any, str]:
    """Ask once: status (0: no answer), decoded JSON or None, and what went wrong in words."""
    import aiohttp

    try:
        async with session.request(method, url, json=body) as response:
            try:
                answer = await response.json(content_type=None)
            except ValueError:
                answer = None
            return response.status, answer, "" if response.status == 200 else f"HTTP {response.status}"
    except TimeoutError:
        return 0, None, f"no answer within {_PROBE_TIMEOUT:g} s"
    except aiohttp.ClientConnectorError as error:  # its own words are long, and speak of TLS where there is none
        return 0, None, (error.os_error.strerror or str(error.os_error)).lower()
    except (aiohttp.ClientError, OSError) as error:
        return 0, None, str(error) or type(error).__name__
