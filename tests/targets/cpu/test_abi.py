"""Python and the native kernels agree, and a library that was built for other numbers is refused by name."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from cpu_graphs import VARIANTS, library

from llmctl.errors import EngineLoadError
from llmctl.targets.cpu import abi
from llmctl.targets.cpu.toolchain import SOURCE_DIR, Variant, find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
# enum in the headers -> (its enumerators' prefix, its name in the table)
ENUMS = {"Kind": ("k", "kind"), "Act": ("k", "act"), "DType": ("k", "dtype"), "KvType": ("kKv", "kv_type")}


@pytest.fixture
def path() -> Path:
    return library(VARIANTS[0])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_library_is_of_this_version(variant: Variant) -> None:
    opened = abi.open_library(library(variant))
    assert f"{opened.llmctl_abi_digest():016x}" == abi.current_digest()
    assert list(abi._library_entries(opened)) == list(abi.abi_entries().items())


def refusal(path: Path) -> str:
    with pytest.raises(EngineLoadError) as error:
        abi.open_library(path)
    assert error.value.fix == "rebuild the engine with llmctl build"
    before, _, after = error.value.message.partition(": built for another version of llmctl: ")
    assert before == f"kernel library {path.name}"
    return after


def test_a_renumbered_activation_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(abi.ACT, "gelu", 3)
    monkeypatch.setitem(abi.ACT, "gelu_tanh", 2)
    assert refusal(path) == "act.gelu: expected 3, found 2"


def test_a_renumbered_kind_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {kind.name: int(kind) for kind in abi.Kind}
    monkeypatch.setattr(abi, "Kind", IntEnum("Kind", numbers | {"MUL": 8, "ADD": 7}))
    assert refusal(path) == "kind.mul: expected 8, found 7"


@pytest.mark.parametrize(("table", "key"), [("DTYPE", "w4"), ("KV_TYPE", "s8"), ("WEIGHT_BITS", "w8")])
def test_every_table_counts(path: Path, monkeypatch: pytest.MonkeyPatch, table: str, key: str) -> None:
    found = getattr(abi, table)[key]
    monkeypatch.setitem(getattr(abi, table), key, 77)
    assert refusal(path) == f"{table.lower()}.{key}: expected 77, found {found}"


def test_a_kind_that_one_side_does_not_know_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(abi.ACT, "tanh", 5)
    assert refusal(path) == "act.tanh: expected 5, found none"
    monkeypatch.delitem(abi.ACT, "tanh")
    monkeypatch.delitem(abi.ACT, "relu")
    assert refusal(path) == "act.relu: expected none, found 4"


def test_a_shifted_field_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = dict(abi.KvDesc._fields_)

    def swap(layout: dict[str, type]) -> None:
        shifted = type("KvDesc", (ctypes.Structure,), {"_fields_": tuple(layout.items())})
        at = [struct.__name__ for struct in abi.STRUCTS].index("KvDesc")
        monkeypatch.setattr(abi, "STRUCTS", (*abi.STRUCTS[:at], shifted, *abi.STRUCTS[at + 1 :]))

    swap({"base": fields["base"], "head_dim": fields["head_dim"], **fields})
    assert refusal(path) == "KvDesc.head_dim.offset: expected 8, found 16"
    swap(fields | {"type": ctypes.c_int64})
    assert refusal(path) == "KvDesc.type.size: expected 8, found 4"
    swap({"base": fields["base"], "extra": ctypes.c_int64, **fields})
    assert refusal(path) == "KvDesc.extra.offset: expected 8, found none"


CONSTANTS = [name for name, value in vars(abi).items() if name.isupper() and isinstance(value, int)]


@pytest.mark.parametrize("constant", CONSTANTS)
def test_every_constant_counts(path: Path, monkeypatch: pytest.MonkeyPatch, constant: str) -> None:
    value = getattr(abi, constant)
    monkeypatch.setattr(abi, constant, value + 8)
    assert refusal(path) == f"{constant.lower()}: expected {value + 8}, found {value}"


def test_the_bytes_of_the_cache_count(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "kv_token_bytes", lambda columns, dtype: columns + 2 if dtype == "s8" else 4 * columns)
    assert refusal(path) == "kv_tile_bytes.bf16: expected 1024, found 512"
    monkeypatch.setattr(abi, "kv_token_bytes", lambda columns, dtype: columns * {"f32": 4, "bf16": 2, "s8": 1}[dtype])
    assert refusal(path) == "kv_tile_bytes.s8: expected 256, found 320"


def test_the_arguments_of_a_call_count(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, arguments = abi.FUNCTIONS["llmctl_create"]
    monkeypatch.setitem(abi.FUNCTIONS, "llmctl_create", (result, arguments[:-1]))
    assert refusal(path).startswith("llmctl_create.signature: expected ")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llmctl_create", lambda _, arguments: (ctypes.c_int, arguments)),
        ("llmctl_create", lambda result, arguments: (result, (*arguments[:4], arguments[9], *arguments[4:9]))),
        ("llmctl_step", lambda result, arguments: (result, (arguments[0], arguments[2], arguments[1]))),
        ("llmctl_profile", lambda result, arguments: (result, (arguments[0], ctypes.POINTER(ctypes.c_float)))),
        ("llmctl_destroy", lambda _, arguments: (ctypes.c_int, arguments)),
        ("llmctl_variant", lambda _, arguments: (ctypes.c_void_p, arguments)),
    ],
    ids=["its result", "an argument's place", "two pointers", "what is pointed to", "a result", "a string"],
)
def test_the_types_of_a_call_count(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., tuple[Any, tuple[Any, ...]]]
) -> None:
    monkeypatch.setitem(abi.FUNCTIONS, name, change(*abi.FUNCTIONS[name]))
    assert refusal(path).startswith(f"{name}.signature: expected ")


@pytest.mark.parametrize(
    ("struct", "name", "kind", "found"),
    [
        ("OpDesc", "act", ctypes.c_float, "expected 3, found 1"),
        ("OpDesc", "layer", ctypes.c_double, "expected 3, found 1"),
        ("OpDesc", "eps", ctypes.c_int32, "expected 1, found 3"),
        ("OpDesc", "w", ctypes.c_int64, "expected 1, found 4"),
        ("StepDesc", "rows", ctypes.c_uint64, "expected 2, found 1"),
        ("StepDesc", "slots", ctypes.c_double, "expected 3, found 4"),
    ],
)
def test_the_type_of_a_field_counts_where_its_size_is_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch, struct: str, name: str, kind: type, found: str
) -> None:
    index = [s.__name__ for s in abi.STRUCTS].index(struct)
    fields = dict(abi.STRUCTS[index]._fields_) | {name: kind}
    changed = type(struct, (ctypes.Structure,), {"_fields_": tuple(fields.items())})
    monkeypatch.setattr(abi, "STRUCTS", (*abi.STRUCTS[:index], changed, *abi.STRUCTS[index + 1 :]))
    assert refusal(path) == f"{struct}.{name}.type: {found}"


def test_another_order_is_another_digest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "ACT", dict(reversed(abi.ACT.items())))
    assert refusal(path) == "the order of what is listed: expected act.relu, found act.none"


def test_a_library_that_does_not_say_is_refused(tmp_path: Path) -> None:
    compiler = find_compiler()
    assert compiler
    old = tmp_path / "old.so"
    (tmp_path / "old.cpp").write_text('extern "C" void llmctl_abi(long* sizes) { sizes[0] = 480; }\n')
    subprocess.run([*compiler, "-shared", "-fPIC", str(tmp_path / "old.cpp"), "-o", str(old)], check=True)
    assert refusal(old) == "llmctl_abi_digest: expected a function, found none"


def test_what_does_not_load_is_refused_in_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("not a library\n")
    with pytest.raises(
        EngineLoadError, match=r"^kernel library text\.so: [^\n]+ \(rebuild the engine with llmctl build\)$"
    ):
        abi.open_library(text)


def headers() -> str:
    """All headers, without comments."""
    text = "".join(path.read_text() for path in sorted(SOURCE_DIR.glob("*.h")))
    return re.sub(r"//[^\n]*", "", text)


def test_every_enumerator_is_in_the_table() -> None:
    found = {}
    for enum, body in re.findall(r"enum (?:class )?(\w+) : \w+ \{(.*?)\}", headers(), re.DOTALL):
        prefix, name = ENUMS[enum]
        for enumerator, number in re.findall(rf"\b{prefix}(\w+) = (\d+)", body):
            snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enumerator).lower()
            found[f"{name}.{snake}"] = int(number)
        assert body.count("=") == len([key for key in found if key.startswith(f"{name}.")])
    tables = {name for _, name in ENUMS.values()}
    assert found == {key: number for key, number in abi.abi_entries().items() if key.split(".")[0] in tables}


def test_every_struct_of_the_interface_is_in_the_table() -> None:
    declared = {s for s in vars(abi).values() if isinstance(s, type) and issubclass(s, ctypes.Structure)}
    assert set(abi.STRUCTS) == declared
    entries = abi.abi_entries()
    for struct in abi.STRUCTS:
        (body,) = re.findall(rf"struct {struct.__name__} \{{(.*?)\n\}};", headers(), re.DOTALL)
        body = re.sub(r"\w+\([^)]*\)[^{;]*\{.*?\}", "", body)  # functions
        names = [name for line in re.findall(r"\b[\w*]+[ *]+([\w, ]+);", body) for name in re.split(r", ", line)]
        assert names == [name for name, *_ in struct._fields_]
        assert all(
            f"{struct.__name__}.{name}.{fact}" in entries for name in names for fact in ("offset", "size", "type")
        )


def test_a_profile_has_room_for_every_kind() -> None:
    assert max(abi.Kind) < abi.MAX_KINDS
