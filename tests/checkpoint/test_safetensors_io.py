"""safetensors IO against the safetensors library, and damaged files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmctl.checkpoint.safetensors_io import (
    SafetensorsFile,
    map_tensor,
    read_header,
    tensor_spec,
    write_safetensors,
    write_sharded,
)
from llmctl.errors import CheckpointError

TENSORS = {
    "b": torch.randn(3, 5).bfloat16(),
    "a": torch.randn(7),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "empty": torch.empty(0, 3),
    "long": torch.arange(4),
    "half": torch.randn(3).half(),
    "scalar é": torch.tensor(1.5),
    "mask": torch.tensor([True, False]),
    "fp8": torch.randn(5).to(torch.float8_e4m3fn),
    "words": torch.tensor([[1, -1]], dtype=torch.int32),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "x.safetensors", {name: tensor_spec(tensor) for name, tensor in TENSORS.items()})
    return tmp_path / "x.safetensors"


def test_bytes_are_the_librarys(path: Path, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "y.safetensors", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_aligned_tensors(tmp_path: Path) -> None:
    """Those that fill whole lines start on lines of the file; the library reads all."""
    tensors = {**TENSORS, "line": torch.randn(16), "two lines": torch.arange(128, dtype=torch.uint8)}
    specs = {name: tensor_spec(tensor) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", specs, align=64)
    with (tmp_path / "x.safetensors").open("rb") as file:
        header = json.loads(file.read(data := int.from_bytes(file.read(8), "little")))
    for name in ("line", "two lines"):
        assert (8 + data + header[name]["data_offsets"][0]) % 64 == 0
    for name, found in load_file(tmp_path / "x.safetensors").items():
        assert found.flatten().view(torch.uint8).tolist() == tensors[name].flatten().view(torch.uint8).tolist()


def test_order_of_the_mapping_does_not_matter(path: Path, tmp_path: Path) -> None:
    backwards = {name: tensor_spec(TENSORS[name]) for name in reversed(TENSORS)}
    write_safetensors(tmp_path / "y.safetensors", backwards)
    assert path.read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_mapped_tensors(path: Path) -> None:
    file = SafetensorsFile(path)
    for name, tensor in TENSORS.items():
        found = map_tensor(file, name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found.view(torch.uint8) if name == "fp8" else found, _comparable(name, tensor))
    assert file.plane("words").dtype == np.int32
    assert not file.plane("a").flags.writeable
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        file.plane("nope")


def _comparable(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if name == "fp8" else tensor


def test_writing_into_a_mapped_tensor_does_not_reach_the_file(path: Path) -> None:
    before = path.read_bytes()
    map_tensor(SafetensorsFile(path), "a").zero_()
    assert path.read_bytes() == before


def test_all_kinds_of_data(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    kinds = {"array": array, "strided": array.T.copy().T, "bytes": array.tobytes(), "lazy": lambda: torch.tensor(array)}
    write_safetensors(tmp_path / "k.safetensors", {name: ("I32", (2, 3), data) for name, data in kinds.items()})
    for tensor in load_file(tmp_path / "k.safetensors").values():
        assert torch.equal(tensor, torch.tensor(array))


def test_data_of_the_wrong_size_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 16 bytes, found 12"):
        write_safetensors(tmp_path / "k.safetensors", {"x": ("F32", (4,), np.zeros(3, np.float32))})
    assert list(tmp_path.iterdir()) == []


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    paths = write_sharded(tmp_path, {name: tensor_spec(t) for name, t in tensors.items()}, max_shard_bytes=100)
    assert [path.name for path in paths] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 280
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_truncation_anywhere_is_noticed(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    write_safetensors(path, {name: tensor_spec(tensor) for name, tensor in TENSORS.items()})
    whole = path.read_bytes()
    size = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:size])
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert "x.safetensors" in str(caught.value)
    assert str(size) in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_header_is_refused_or_describes_tensors_inside_the_file(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    write_safetensors(path, {name: tensor_spec(tensor) for name, tensor in TENSORS.items()})
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for name in file.tensors:
        file.plane(name)


def with_header(path: Path, header: str | dict, data: bytes = bytes(16)) -> Path:
    raw = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = entry([4], [0, 16])
HOSTILE: dict[str, str | dict] = {
    "nested": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "nested arrays": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "nested shape": '{"x":{"dtype":"F32","shape":' + "[" * 900 + "]" * 900 + ',"data_offsets":[0,16]}}',
    "infinite offset": '{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,1e999]}}',
    "offset that is no number": '{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,NaN]}}',
    "fractions": {"x": entry([4], [0, 16.0])},
    "fractions of an element": {"x": entry([4.5], [0, 18])},
    "truth": {"x": entry([True], [False, 4]), "y": entry([3], [4, 16])},
    "text": {"x": entry("4", [0, 16])},
    "negative": {"x": entry([4], [-16, 0])},
    "negative shape": {"x": entry([-2, -2], [0, 16])},
    "backwards": {"x": entry([4], [16, 0])},
    "overlap": {"x": entry([4], [0, 16]), "y": entry([2], [8, 16])},
    "twice": {"x": entry([4], [0, 16]), "y": entry([4], [0, 16])},
    "hole": {"x": entry([2], [0, 8]), "y": entry([1], [12, 16])},
    "one offset": {"x": entry([4], [16])},
    "huge and empty": {"x": entry([0, 2**62, 2**62], [0, 0]), "y": GOOD},
    "beyond 64 bits": {"x": entry([0, 2**70], [0, 0]), "y": GOOD},
    "a hundred axes": {"x": entry([1] * 100, [0, 4]), "y": entry([3], [4, 16])},
    "dtype": {"x": entry([4], [0, 16], ["F32"])},
    "unknown dtype": {"x": entry([4], [0, 16], "F4")},
    "no fields": {"x": 3},
    "metadata": {"__metadata__": ["a"], "x": GOOD},
    "metadata of numbers": {"__metadata__": {"a": 1}, "x": GOOD},
    "half a character": '{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "lines in a name": {"x\ny": GOOD},
    "one name twice": '{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
    '"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_one_line(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(with_header(tmp_path / "x.safetensors", HOSTILE[kind]))
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    if kind in ("dtype", "one offset"):
        assert "expected a dtype, and data_offsets of two numbers" in str(caught.value)
    assert SafetensorsFile(with_header(tmp_path / "y.safetensors", {"x": GOOD})).plane("x").shape == (4,)


NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.integers(-1, 20), st.floats(), st.booleans())
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_header_is_refused_or_describes_the_file(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """Fields of a good header replaced by any JSON: refused in one line, or every tensor lies where it says."""
    header: dict = {"x": entry([4, 2], [0, 32]), "y": entry([3], [32, 44]), "z": entry([], [44, 46], "F16")}
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(["x", "y", "z", "w", "__metadata__"]))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
        value = data.draw(st.one_of(JSON, st.lists(NUMBERS, max_size=3)))
        if field is None or not isinstance(header.get(name), dict):
            header[name] = value
        else:
            header[name] = {**header[name], field: value}
    path = with_header(tmp_path_factory.mktemp("t") / "x.safetensors", header, bytes(46))
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        said = str(error)
        file = None
    if file is None:
        assert "\n" not in said
        return
    assert sum(file.plane(name).nbytes for name in file.tensors) == 46
    for name in file.tensors:
        assert list(map_tensor(file, name).shape) == header[name]["shape"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(60), "not a safetensors file|truncated"),
        ((2).to_bytes(8, "little") + b"[]", "damaged safetensors header"),
        ((2).to_bytes(8, "little") + b"{}xx", "trailing bytes: expected 10 bytes, found 12"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_header(tmp_path / "x.safetensors")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


def test_torch_is_not_imported() -> None:
    code = "import sys, llmctl.checkpoint.safetensors_io; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_what_was_read_can_be_given_back(tmp_path: Path) -> None:
    size = 32 * 2**20
    write_safetensors(tmp_path / "a.safetensors", {"a": ("U8", (size,), np.full(size, 7, np.uint8))})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    tensor = map_tensor(file, "a")

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssFile:")[1].split()[0])

    before = resident()
    assert int(tensor.long().sum()) == 7 * size
    read = resident()
    file.release()
    assert read - before > size // 2 > resident() - before
    assert int(tensor.long().sum()) == 7 * size
