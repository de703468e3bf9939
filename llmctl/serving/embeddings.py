"""``/v1/embeddings``: hidden states that the engine has pooled, as vectors in OpenAI's shape."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from llmctl.engine.deadline import Deadline
from llmctl.engine.output import TextOutput
from llmctl.engine.pooling import Pooling
from llmctl.engine.sampling_params import SamplingParams
from llmctl.errors import RequestError
from llmctl.serving.adapters import ServedAdapter
from llmctl.serving.context import ServerContext
from llmctl.serving.embedding_schema import EmbeddingRequest
from llmctl.serving.exchange import check_options, check_outline, submitted
from llmctl.serving.generation import SequenceSpec
from llmctl.serving.intake import Prompt
from llmctl.serving.observation import Observation
from llmctl.serving.openai_errors import json_response
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import given_prompts
from llmctl.serving.responses import UsageCount

_NOTHING = SamplingParams(max_tokens=0)
# What writing numbers takes, by the measure of ``TextWorkers``: 0.19 and 0.012 µs a number, measured.
_NUMBERS_PER_BYTE = {"float": 4, "base64": 64}


def check_inputs(context: ServerContext, outline: Outline) -> None:
    """As ``check_outline``, of inputs."""
    check_outline(context, outline, lambda given: given.prompts("input"), "input")


async def answer_embeddings(seen: Observation, body: EmbeddingRequest) -> Response:
    """The response to an embedding request.

    Raises:
        LlmctlError: refused.
    """
    context = seen.context
    seen.body, model = body, context.model(body.model)
    deadline = check_options(seen.request, context, body)
    seen.model = model.name
    check_shape(body, model.info.hidden_size)
    context.client.check_room(len(given_prompts(body.input)), "input")
    seen.prompts = await model.intake.prompts(body.input, "input", add_special_tokens=body.add_special_tokens)
    specs = sequences(body, seen.prompts, deadline, Pooling(body.pooling or context.config.pooling), model.adapter)
    seen.usage = UsageCount(sum(len(prompt.token_ids) for prompt in seen.prompts))
    with submitted(seen, body, specs) as (generation, watcher):
        outputs = await generation.result()
    watcher.cancel()
    for index, output in enumerate(outputs):
        seen.usage.count(index, output)
    dimensions = body.dimensions or model.info.hidden_size
    size = len(outputs) * dimensions // _NUMBERS_PER_BYTE[body.encoding_format or "float"]
    prompt_tokens = seen.usage.prompt_tokens
    response = await model.intake.workers.finish(
        size, lambda: json_response(document(body, outputs, model.name, prompt_tokens))
    )
    seen.end()
    return response


def check_shape(body: EmbeddingRequest, hidden_size: int) -> None:
    """Refuse what a vector of ``hidden_size`` numbers cannot become.

    Raises:
        RequestError.
    """
    if body.dimensions is not None and body.dimensions > hidden_size:
        raise RequestError(
            f"dimensions: expected at most the model's {hidden_size}, found {body.dimensions}",
            fix=f"leave it out for all {hidden_size}",
            param="dimensions",
        )


def sequences(
    body: EmbeddingRequest,
    prompts: Iterable[Prompt],
    deadline: Deadline,
    pooling: Pooling,
    adapter: ServedAdapter | None,
) -> list[SequenceSpec]:
    """What the engine is asked for. No token follows the vector: an ITL deadline is kept, and must hold nobody back."""
    due = Deadline(ttft=deadline.ttft)
    return [
        SequenceSpec(
            prompt_token_ids=prompt.token_ids,
            params=_NOTHING,
            priority=body.priority or 0,
            cache_salt=body.cache_salt,
            deadline=due,
            pooling=pooling,
            adapter=adapter,
        )
        for prompt in prompts
    ]


def document(body: EmbeddingRequest, outputs: list[TextOutput], model_name: str, prompt_tokens: int) -> dict[str, Any]:
    """OpenAI's list of embeddings, for msgspec to encode."""
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _written(body, output)}
            for index, output in enumerate(outputs)
        ],
        "model": model_name,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


def _written(body: EmbeddingRequest, output: TextOutput) -> msgspec.Raw | str:
    """One vector. Numbers are encoded by themselves: in one call those of all would keep every thread waiting."""
    assert output.embedding is not None
    vector = shaped(output.embedding, body.dimensions, normalize=body.normalize is not False)
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return msgspec.Raw(msgspec.json.encode(vector.tolist()))


def shaped(vector: NDArray[np.float32], dimensions: int | None, *, normalize: bool) -> NDArray[np.float32]:
    """The first ``dimensions`` (None: all) of a vector f32; to ``normalize`` scales them to the length 1, but zeros."""
    vector = vector[:dimensions]
    length = np.sqrt(np.square(vector, dtype=np.float64).sum())
    return (vector / length).astype(np.float32) if normalize and length > 0 else vector
