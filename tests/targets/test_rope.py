"""RoPE tables against transformers' own, the rotation against its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmctl.graph.rope_config import rope_attrs
from llmctl.targets.reference import kernels
from llmctl.targets.rope import cos_sin_table, inverse_frequencies

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn given": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 0.9,
        "beta_fast": 16.0, "beta_slow": 3.0, "truncate": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_frequencies_equal_transformers(variant: str, theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {**VARIANTS[variant], "rope_theta": theta}
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=2048, rope_parameters=dict(parameters)
    )
    theirs = LlamaRotaryEmbedding(config)
    attrs = rope_attrs({"rope_parameters": parameters}, 64, 2048)
    np.testing.assert_allclose(inverse_frequencies(attrs), theirs.inv_freq.numpy(), rtol=2e-6)
    positions = torch.arange(2048)[None]
    cos, sin = (t[0, :, :32].numpy() for t in theirs(torch.zeros(1), positions))
    ours = cos_sin_table(attrs, 2048)
    # One unit in the last place of a frequency, 2000 positions away.
    np.testing.assert_allclose(ours[0], cos, atol=4e-4)
    np.testing.assert_allclose(ours[1], sin, atol=4e-4)


@pytest.mark.parametrize("style", ["neox", "gptj"])
@pytest.mark.parametrize(("dim", "rotary"), [(8, 8), (12, 4), (10, 10)])
def test_rotation_is_by_the_pairs_angle(style: str, dim: int, rotary: int) -> None:
    """Each pair, read as a complex number, is multiplied by exp(i * angle); other dimensions pass through."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, dim)).astype(np.float32)
    angle = rng.normal(size=(5, rotary // 2)).astype(np.float32)
    first = np.arange(rotary // 2) * (2 if style == "gptj" else 1)
    second = first + (1 if style == "gptj" else rotary // 2)
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle)[:, None]
    expected = x.copy()
    expected[..., first], expected[..., second] = turned.real, turned.imag
    factors = kernels.rope_factors(torch.from_numpy(np.cos(angle)), torch.from_numpy(np.sin(angle)), style)
    found = kernels.rope(torch.from_numpy(x.reshape(5, -1)), factors, dim, style)
    np.testing.assert_allclose(found.numpy(), expected.reshape(5, -1), atol=1e-6)


def test_bad_attributes() -> None:
    attrs = {"rotary_dim": 8, "theta": 1e4, "rope_type": "spiral"}
    with pytest.raises(ValueError, match="unknown rope_type 'spiral'"):
        inverse_frequencies(attrs)
    with pytest.raises(ValueError, match="rope_type 'llama3' needs attribute 'factor'"):
        inverse_frequencies({**attrs, "rope_type": "llama3"})
    with pytest.raises(ValueError, match="unknown rope style"):
        kernels.rope_factors(torch.zeros(1, 2), torch.zeros(1, 2), "sideways")
