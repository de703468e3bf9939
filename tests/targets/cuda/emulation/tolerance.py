"""The tolerance of every kernel: error against fp32 at most twice the same-dtype torch op's, plus a small floor."""

from __future__ import annotations

import torch

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def assert_as_good_as_torch(found: torch.Tensor, exact: torch.Tensor, torch_result: torch.Tensor) -> None:
    """Hold ``found`` to the error that torch makes in the same dtype.

    Args:
        found: the kernel's result. exact: the result in float32 or better. torch_result: torch's in found's dtype.
    """
    assert found.shape == exact.shape == torch_result.shape
    if exact.numel() == 0:
        return
    # Half a unit in the last place of the largest value: what rounding the exact result costs.
    floor = exact.abs().max().item() * torch.finfo(found.dtype).eps / 2 + 1e-6
    limit = 2 * (torch_result.double() - exact.double()).abs().max().item() + floor
    error = (found.double() - exact.double()).abs()
    worst = error.argmax()
    assert torch.isfinite(found.float()).all()
    assert error.max() <= limit, (
        f"element {worst.item()}: {found.flatten()[worst]} for {exact.flatten()[worst]}, limit of error {limit:.3g}"
    )
