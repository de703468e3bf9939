"""The work folder beside the output: finished layers, so that an interrupted run can continue to the same bytes.

``<output>.partial/`` holds ``options.json`` (what the result depends on, the code included),
``calibration.safetensors`` (token ids), ``allocation.json`` (bits chosen under a budget),
``hidden-NNNNN.safetensors`` (activations entering layer N) and ``layer-NNNNN.safetensors`` (that layer's result, with
its report in ``layer-NNNNN.json``). Every file appears by a rename; a layer counts once the activations after it are
there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmctl
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.safetensors_io import SafetensorsFile, map_tensor, tensor_spec, write_safetensors
from llmctl.checkpoint.writer import check_new
from llmctl.errors import CheckpointError, UsageError
from llmctl.graph.graph import QuantScheme
from llmctl.graph.serial import scheme_from_dict, scheme_to_dict
from llmctl.quantize.budget import Allocation

_PLANES = ("codes", "scales", "zeros", "g_idx")


@dataclass(frozen=True)
class LayerResult:
    """What quantizing one decoder layer gave.

    Attributes:
        quantized: graph weight name -> its codes.
        dense: graph weight name -> new f32 value of an unquantized weight that folding changed.
        report: JSON data for the table at the end.
    """

    quantized: Mapping[str, QuantizedWeight]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


class WorkFolder:
    """A run's work folder. Made by ``open_work_folder``; ``resumed`` says whether it held an earlier run's options."""

    def __init__(self, path: Path, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed

    # calibration

    def save_calibration(self, tokens: Tensor, note: str) -> None:
        """Keep the calibration token ids, i32 ``[samples, length]``, and a sentence on where they came from."""
        write_safetensors(self.path / "calibration.safetensors", {"tokens": tensor_spec(tokens)}, {"note": note})

    def load_calibration(self) -> tuple[Tensor, str] | None:
        """What ``save_calibration`` kept, None before that."""
        path = self.path / "calibration.safetensors"
        if not path.exists():
            return None
        file = SafetensorsFile(path)
        return map_tensor(file, "tokens").clone(), file.header.metadata.get("note", "")

    # bits

    def save_allocation(self, allocation: Allocation) -> None:
        """Keep the bits that were chosen."""
        write_text(self.path / "allocation.json", json.dumps(asdict(allocation)))

    def load_allocation(self) -> Allocation | None:
        """What ``save_allocation`` kept, None before that."""
        path = self.path / "allocation.json"
        return Allocation(**json.loads(path.read_text())) if path.exists() else None

    # layers

    def finished(self) -> int:
        """The next step to run: all layer files before it and the activations entering it are there."""
        done = 0
        while self._layer(done).exists():
            done += 1
        # A crash may fall between a layer's file and the activations after it: that layer runs again.
        return next((step for step in (done, done - 1) if self._hidden(step).exists()), 0)

    def save_layer(self, index: int, result: LayerResult, hidden: Mapping[str, Tensor]) -> None:
        """Keep step ``index``'s result and the activations after it; drop the activations before it."""
        planes = {
            f"{name}.{plane}": tensor_spec(getattr(weight, plane).cpu())
            for name, weight in result.quantized.items()
            for plane in _PLANES
            if getattr(weight, plane) is not None
        }
        planes |= {f"{name}.dense": tensor_spec(value.cpu()) for name, value in result.dense.items()}
        write_text(self._layer(index).with_suffix(".json"), json.dumps(result.report))
        schemes = {name: scheme_to_dict(weight.scheme) for name, weight in result.quantized.items()}
        write_safetensors(self._layer(index), planes, {"schemes": json.dumps(schemes)})
        self.save_hidden(index + 1, hidden)
        self._hidden(index).unlink(missing_ok=True)

    def save_hidden(self, index: int, hidden: Mapping[str, Tensor]) -> None:
        """Keep the activations entering step ``index``, f32 by buffer name."""
        write_safetensors(self._hidden(index), {name: tensor_spec(value.cpu()) for name, value in hidden.items()})

    def load_hidden(self, index: int) -> dict[str, Tensor] | None:
        """The activations entering step ``index``, None if they were not kept."""
        if not self._hidden(index).exists():
            return None
        file = SafetensorsFile(self._hidden(index))
        return {name: map_tensor(file, name).clone() for name in file.tensors}

    def load_layer(self, index: int) -> LayerResult:
        """Step ``index``'s result; tensors are mapped from the file.

        Raises:
            CheckpointError: the file is damaged.
        """
        file = SafetensorsFile(self._layer(index))
        schemes = json.loads(file.header.metadata["schemes"])
        dense = {name.rpartition(".")[0]: map_tensor(file, name) for name in file.tensors if name.endswith(".dense")}
        quantized = {name: _weight(file, name, scheme_from_dict(schemes[name])) for name in sorted(schemes)}
        return LayerResult(quantized, dense, json.loads(self._layer(index).with_suffix(".json").read_text()))

    def remove(self) -> None:
        """Delete the folder: the output is in place."""
        shutil.rmtree(self.path)

    def _layer(self, index: int) -> Path:
        return self.path / f"layer-{index:05d}.safetensors"

    def _hidden(self, index: int) -> Path:
        return self.path / f"hidden-{index:05d}.safetensors"


def _weight(file: SafetensorsFile, name: str, scheme: QuantScheme) -> QuantizedWeight:
    planes = {p: map_tensor(file, f"{name}.{p}") for p in _PLANES if f"{name}.{p}" in file.tensors}
    return QuantizedWeight(scheme=scheme, **planes)


def partial_path(output: Path) -> Path:
    """The work folder of an output folder."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path, resume: bool) -> None:
    """Refuse an output that exists, or an interrupted run's leftovers without ``--resume``; touches nothing.

    Raises:
        UsageError: as said.
    """
    check_new(output)
    if partial_path(output).exists() and not resume:
        raise UsageError(
            f"{partial_path(output)}: left by an interrupted run",
            fix="continue it with --resume, or remove that folder to start afresh",
            param="resume",
        )


def open_work_folder(output: Path, options: Mapping[str, Any]) -> WorkFolder:
    """The work folder of ``output``: a new one, or an interrupted run's if its options are the same.

    Args:
        options: JSON data, everything the result's bytes depend on.

    Raises:
        UsageError: the interrupted run had other options (they are named).
        CheckpointError: its ``options.json`` is damaged.
    """
    path = partial_path(output)
    wanted = json.loads(json.dumps({**options, "llmctl": code_version(), "torch": str(torch.__version__)}))
    if not (path / "options.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "options.json", json.dumps(wanted, indent=2))
        return WorkFolder(path, resumed=False)
    try:
        found = json.loads((path / "options.json").read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}/options.json: damaged", fix="remove the folder to start afresh") from error
    differing = [key for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)]
    if differing:
        said = "; ".join(f"{key.replace('_', '-')} was {found.get(key)}, is {wanted.get(key)}" for key in differing)
        raise UsageError(
            f"--resume: the interrupted run had other options: {said}",
            fix=f"continue it as it began, or remove {path} to start afresh",
            param="resume",
        )
    return WorkFolder(path, resumed=True)


@functools.cache
def code_version() -> str:
    """llmctl's version and a digest of its code: layers of one model are not to come from two arithmetics."""
    package = Path(llmctl.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{llmctl.__version__}+{digest.hexdigest()[:12]}"


def write_text(path: Path, text: str) -> None:
    """Write a small file beside its place, fsync it and rename it; nothing is left of one that does not fit."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
