"""Random quantized weights."""

from __future__ import annotations

import torch

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme


def random_weight(rows: int, columns: int, scheme: QuantScheme, seed: int = 0) -> QuantizedWeight:
    """Codes, scales, zeros and (with act-order) groups drawn from a seed."""
    rng = torch.Generator().manual_seed(seed)
    groups, top = scheme.groups(columns), 2**scheme.bits
    zeros = torch.randint(1, top, (rows, groups), generator=rng)
    order = torch.randint(0, groups, (columns,), generator=rng).int()
    return QuantizedWeight(
        torch.randint(0, top, (rows, columns), generator=rng).to(torch.uint8),
        torch.rand(rows, groups, generator=rng).half(),
        (torch.full_like(zeros, top // 2) if scheme.symmetric else zeros).to(torch.uint8),
        scheme,
        order if scheme.act_order else None,
    )
