"""The launcher's table of signatures is that of the sources: every entry, every parameter, in order and in width."""

from __future__ import annotations

import pytest
from emulator import kernels, missing

import llmctl.targets.cuda.attention_signatures
import llmctl.targets.cuda.experts_signatures
import llmctl.targets.cuda.gemm_signatures
import llmctl.targets.cuda.lora_signatures  # noqa: F401  (they register their entries)
from llmctl.targets.cuda.call import Array
from llmctl.targets.cuda.signatures import SIGNATURES

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
POINTER, KINDS = 8, {"f32": 104, "i32": 204}


@pytest.mark.parametrize("source", sorted({signature.source for signature in SIGNATURES.values()}))
def test_signatures_are_those_of_the_source(source):
    found = kernels(source)
    table = {entry: signature for entry, signature in SIGNATURES.items() if signature.source == source}
    assert set(table) == set(found.names)
    for entry, signature in table.items():
        parameters = found._entries[entry].parameters
        assert tuple(p.name for p in signature.parameters) == parameters, entry
        kinds = tuple(POINTER if isinstance(p, Array) else KINDS[p.dtype] for p in signature.parameters)
        assert kinds == found._entries[entry].kinds, entry
