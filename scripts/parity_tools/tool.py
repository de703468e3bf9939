"""What the tools' scripts share: their command line, and the weights that a loaded model computes with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


@torch.inference_mode()
def save_weights(
    model: nn.Module,
    output: Path,
    dtype: torch.dtype = torch.float16,
    decoded: Callable[[nn.Module], Tensor | None] = lambda _: None,
) -> None:
    """Every linear's weight [N, K] in the dtype it computes in, by its module's name.

    One that is kept as codes is given the identity: each row picks one column, and nothing is added to it but zeros, so
    whatever the kernel, the weight comes out as it was decoded, rounded to ``dtype``. ``decoded``: the weight of those
    whose kernel rounds further, by the tool's own function.
    """
    found = {}
    for name, module in linears(model):
        weight = decoded(module)
        found[name] = (_weight(module, dtype) if weight is None else weight).contiguous()
    if not found:
        raise ValueError("the model has no linears")
    save_file(found, output)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linears of the decoder layers, by their names in a checkpoint."""
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            at = name.find("layers.")
            yield f"model.{name[at:]}", module


def _weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    bias = getattr(module, "bias", None)
    if bias is not None and bool(bias.any()):
        raise ValueError("expected linears without biases")
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return weight
    return module(torch.eye(module.in_features, dtype=dtype)).T


def main(load: Callable[[Path, Path], None], make: Callable[[str, Path, Path], None]) -> None:
    """``load FOLDER OUTPUT``: a checkpoint's weights; ``make KIND DENSE FOLDER``: a checkpoint of the tool's own."""
    match sys.argv[1:]:
        case ["load", folder, output]:
            load(Path(folder), Path(output))
        case ["make", kind, dense, folder]:
            make(kind, Path(dense), Path(folder))
        case _:
            sys.exit(f"expected load FOLDER OUTPUT or make KIND DENSE FOLDER, found {sys.argv[1:]}")
