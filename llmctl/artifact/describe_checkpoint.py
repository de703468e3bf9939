"""What can be said of a checkpoint of which no graph can be made: its tensors, how they are stored, its tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmctl.artifact.manifest import QuantizationRecord
from llmctl.artifact.memory import human_bytes
from llmctl.artifact.strict import to_data
from llmctl.checkpoint.methods import NOTES
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.resolve import resolve_model
from llmctl.errors import CheckpointError
from llmctl.graph.graph import QuantScheme


def describe_checkpoint(model: str, not_built: str) -> dict[str, Any]:
    """The document of a checkpoint.

    Args:
        not_built: why no engine can be made of it.

    Raises:
        ModelNotFoundError, CheckpointError, UnsupportedModelError: as ``open_checkpoint`` and ``Checkpoint.describe``.
    """
    checkpoint = open_checkpoint(resolve_model(model))
    found = {name: checkpoint.describe(name) for name in checkpoint.names()}
    stored: dict[tuple[str, QuantScheme | None], list[int]] = {}
    for info in found.values():
        stored.setdefault((info.dtype, info.quant), []).append(info.nbytes)
    return {
        "path": model,
        "kind": "checkpoint, of which no engine can be made",
        "not_built": not_built,
        "model_type": checkpoint.config["model_type"],
        "dtype": checkpoint.dtype,
        "size": human_bytes(checkpoint.nbytes),
        "tokenizer": _tokenizer(checkpoint),
        "stored": [
            {
                "quantization": quantization_document(_record(checkpoint, scheme)),
                "dtype": dtype,
                "count": len(sizes),
                "bytes": sum(sizes),
            }
            for (dtype, scheme), sizes in stored.items()
        ],
        "weights": [
            {"name": name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
            for name, info in found.items()
        ],
    }


def quantization_document(record: QuantizationRecord) -> dict[str, Any]:
    """A record, and what an engine does otherwise than its method's owner."""
    return {**to_data(record), "note": NOTES.get((record.method, record.bits), "")}


def _record(checkpoint: Checkpoint, scheme: QuantScheme | None) -> QuantizationRecord:
    if scheme is None or checkpoint.quantization is None:
        return QuantizationRecord()
    return QuantizationRecord(checkpoint.quantization.method, **asdict(scheme))


def _tokenizer(checkpoint: Checkpoint) -> str:
    """Its algorithm and size, or why it is not read."""
    try:
        data = checkpoint.aux_files().get("tokenizer.json")
        if data is None:
            return "no tokenizer.json"
        model = json.loads(data.read_bytes() if isinstance(data, Path) else data)["model"]
        return f"{model.get('type', 'of no named type')}, {len(model['vocab'])} tokens and those added"
    except CheckpointError as error:
        return f"not read: {error.message}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"tokenizer.json is not understood: {error!r:.120}"
