"""Every tensor of an adapter accounted for: by what its settings name, and by what the model has."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llmctl.checkpoint.accounting import name_some
from llmctl.checkpoint.adapters.adapter import DAMAGED, adapter_error
from llmctl.checkpoint.adapters.base_tensors import BaseTensors
from llmctl.checkpoint.adapters.settings import AdapterSettings
from llmctl.checkpoint.adapters.stored import MAGNITUDES, StoredTensors
from llmctl.checkpoint.adapters.targets import Targets, is_saved

OTHER_MODEL = "check that the adapter was trained on this model"


def account(
    folder: Path, settings: AdapterSettings, targets: Targets, stored: StoredTensors, base: BaseTensors
) -> None:
    """Refuse an adapter whose tensors are not those that its settings and the model make.

    Raises:
        CheckpointError: tensors that are missing, superfluous, or of modules that this model does not have.
    """
    for problem, fix in (
        *_pieces(settings, stored, base),
        *_targets(settings, targets, stored, base),
        *_whole(settings, stored, base),
    ):
        raise adapter_error(folder, problem, fix)


Problems = Iterable[tuple[str, str | None]]


def _pieces(settings: AdapterSettings, stored: StoredTensors, base: BaseTensors) -> Problems:
    """Each module is one of the model's, of the right kind, and has all that LoRA or DoRA has."""
    wanted = {"A", "B", *((MAGNITUDES,) if settings.dora else ())}
    if odd := stored.low_rank.keys() - base.matrices().keys():
        yield f"LoRA of modules that this model does not have: {name_some(odd)}", OTHER_MODEL
    for module, pieces in stored.low_rank.items():
        if missing := wanted - pieces.keys():
            yield f"'{module}': lora_{min(missing)} is missing", DAMAGED
        if superfluous := pieces.keys() - wanted:
            yield f"'{module}': lora_{min(superfluous)} is there, though use_dora is not set", DAMAGED
        if (module in stored.tables) != (module in base.tables):
            kind = "an embedding" if module in base.tables else "no embedding"
            yield f"'{module}' is {kind} in this model", OTHER_MODEL


def _targets(settings: AdapterSettings, targets: Targets, stored: StoredTensors, base: BaseTensors) -> Problems:
    """The modules that have tensors are those that ``target_modules`` name."""
    if settings.targets is None:
        return
    spelt = stored.spelling()
    named = {
        module
        for module in base.matrices()
        if targets.names(spelt(module), linear=module not in base.tables, head=module == base.head)
    }
    if missing := named - stored.low_rank.keys():
        yield f"target_modules name modules without tensors: {name_some(missing)}", DAMAGED
    if odd := stored.low_rank.keys() - named:
        yield f"tensors of modules that target_modules do not name: {name_some(odd)}", None


def _whole(settings: AdapterSettings, stored: StoredTensors, base: BaseTensors) -> Problems:
    """Whole tensors are those of ``modules_to_save``, trained biases, and embeddings that were saved along."""
    saved = {name for name in base.shapes if is_saved(_module(name), settings.saved)}
    embeddings = {f"{module}.weight" for module in (*base.tables, base.head)}
    biases = {name for name in base.shapes if name.endswith(".bias")} if settings.bias != "none" else set()
    if odd := stored.whole.keys() - base.shapes.keys():
        yield f"tensors that this model does not have: {name_some(odd)}", OTHER_MODEL
    if odd := stored.whole.keys() - saved - embeddings - biases:
        yield f"tensors that no setting speaks of: {name_some(odd)}", None
    if missing := saved - stored.whole.keys():
        yield f"modules_to_save: no tensors of {name_some(missing)}", DAMAGED
    for entry in settings.saved:
        if not any(is_saved(_module(name), (entry,)) for name in base.shapes):
            yield f"modules_to_save: '{entry[:80]}' is no module of this model", OTHER_MODEL


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
