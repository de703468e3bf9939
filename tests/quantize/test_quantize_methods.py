"""Words on the command line for methods and bits that are none: the nearest that is one is offered."""

from __future__ import annotations

import pytest

from llmctl.config import QuantizeConfig
from llmctl.errors import UsageError
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.grid import check_scheme
from llmctl.quantize.methods import METHODS, method_of


@pytest.mark.parametrize(
    ("method", "fix"),
    [
        ("int4", "--method awq --bits 4"),
        ("INT8", "--method rtn --bits 8"),
        ("AWQ", "--method awq"),
        ("magic", "--method auto"),
    ],
)
def test_an_unknown_method_is_met_with_one_that_works(method: str, fix: str) -> None:
    with pytest.raises(UsageError, match=f"--method {method}: expected auto or one of rtn") as caught:
        method_of(QuantizeConfig(method=method))
    assert caught.value.fix == fix
    assert fix.split()[1] in ("auto", *METHODS)


@pytest.mark.parametrize(("bits", "nearest"), [(2, 3), (5, 4), (16, 8)])
def test_unknown_bits_are_met_with_the_nearest(bits: int, nearest: int) -> None:
    with pytest.raises(UsageError, match=f"--bits {bits}: expected one of 3, 4, 8") as caught:
        check_scheme(QuantScheme(bits, 128, False), {})
    assert caught.value.fix == f"--bits {nearest}"
