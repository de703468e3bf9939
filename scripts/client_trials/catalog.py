"""The clients and their pinned versions, and the scenarios that each may play."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "clients"

SCENARIOS = {
    "chat": "chat",
    "stream": "stream",
    "completions": "completions",
    "seed": "seed",
    "json_schema": "JSON schema",
    "tools": "tools",
    "tools_stream": "tools, streamed",
    "reasoning": "reasoning",
    "logprobs": "logprobs",
    "embeddings": "embeddings",
    "responses": "Responses",
    "messages": "Messages",
    "bad_model": "unknown model",
    "wrong_key": "wrong key",
}
"""Title by name. What each asks is in ``scripts/clients``, in the words of each client."""


@dataclass(frozen=True)
class Client:
    """A client.

    Attributes:
        script: its scenarios, a file in ``scripts/clients``: Python, or JavaScript for npm's.
        packages: what is installed, pinned; the first is the client, whose version is reported.
    """

    name: str
    script: str
    packages: tuple[str, ...]

    @property
    def is_npm(self) -> bool:
        """Whether it runs in Node.js."""
        return self.script.endswith(".mjs")

    @property
    def path(self) -> Path:
        """Of its scenarios."""
        return SCRIPTS / self.script


CLIENTS = (
    Client("openai", "with_openai.py", ("openai==3.57.0",)),
    Client("openai (npm)", "with_openai.mjs", ("openai@7.57.0",)),
    Client("AI SDK (npm)", "with_ai_sdk.mjs", ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7")),
    Client("anthropic", "with_anthropic.py", ("anthropic==2.14.0",)),
    Client("litellm", "with_litellm.py", ("litellm==1.110.2",)),
    Client("langchain-openai", "with_langchain.py", ("langchain-openai==1.7.4",)),
    Client("instructor", "with_instructor.py", ("instructor==1.17.0",)),
    Client("pydantic-ai", "with_pydantic_ai.py", ("pydantic-ai-slim[anthropic,openai]==2.68.0",)),
    Client("openai-agents", "with_openai_agents.py", ("openai-agents==0.24.0",)),
    Client("llm", "with_llm.py", ("llm==0.36",)),
    Client("lm_eval", "with_lm_eval.py", ("lm_eval[api]==0.4.13", "transformers==5.23.0")),
    Client("guidellm", "with_guidellm.py", ("guidellm==0.8.1", "torch==2.13.0")),
    Client("huggingface_hub", "with_huggingface_hub.py", ("huggingface_hub==2.4.0",)),
)
