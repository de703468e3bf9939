#!/usr/bin/env python3
"""A random mixture of experts as a Hugging Face folder, bfloat16, its tokens bytes: to time engines of such models.

    python scripts/random_mixture.py ./mixture                       # 64 experts, 8 chosen, 0.3 billion weights
    llmctl quantize --model ./mixture --method rtn --output ./mixture-4bit
    llmctl build --model ./mixture-4bit --target cpu --output ./engine
    llmctl bench profile --model ./engine --only decode

What it would say is noise; which experts a token takes is as even as chance has it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmctl.checkpoint.safetensors_io import TensorSpec, write_sharded
from llmctl.checkpoint.writer import check_new
from llmctl.errors import ExitCode, LlmctlError
from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph

_SPREAD = 0.02
_BYTES = 256


def main() -> int:
    """Write the folder; the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to create")
    for name, default in (
        ("--hidden", 1024),
        ("--width", 384),
        ("--layers", 4),
        ("--experts", 64),
        ("--chosen", 8),
        ("--vocab", 32000),
    ):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    if args.vocab < _BYTES:
        parser.error(f"--vocab: expected {_BYTES} or more, a token for each byte, found {args.vocab}")
    config = {
        **{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16"},
        **{"vocab_size": args.vocab, "hidden_size": args.hidden, "intermediate_size": args.width},
        **{"num_hidden_layers": args.layers, "num_attention_heads": args.hidden // 64, "head_dim": 64},
        **{"num_key_value_heads": max(1, args.hidden // 256), "moe_intermediate_size": args.width},
        **{"num_experts": args.experts, "num_experts_per_tok": args.chosen, "norm_topk_prob": True},
        **{"max_position_embeddings": 32768, "tie_word_embeddings": False},
    }
    try:
        check_new(args.output)
        graph = build_graph(config)
        args.output.mkdir(parents=True)
        write_sharded(args.output, _tensors(graph), max_shard_bytes=2 * 10**9)
        _tokenizer().save(str(args.output / "tokenizer.json"))
        (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except LlmctlError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(ExitCode.USAGE)
    return 0


def _tokenizer() -> Tokenizer:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _tensors(graph: Graph) -> dict[str, TensorSpec]:
    """Every tensor of a plain graph, made when its turn to be written comes."""
    specs: dict[str, TensorSpec] = {}
    for weight in graph.weights.values():
        for part in weight.parts:
            shape = (weight.shape[0] // len(weight.parts), *weight.shape[1:])
            specs[part.tensor] = ("BF16", shape, _Random(shape, len(specs)))
    return specs


class _Random:
    """Norms of one, matrices of small normal values."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self._shape, self._seed = shape, seed

    def __call__(self) -> torch.Tensor:
        if len(self._shape) == 1:
            return torch.ones(self._shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(self._seed)
        return (torch.randn(self._shape, generator=generator) * _SPREAD).bfloat16()


if __name__ == "__main__":
    sys.exit(main())
