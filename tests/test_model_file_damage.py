"""Damaged, cut off, lying and hostile model files: a clear error, the model unchanged, no memory that the file does not
justify."""

from __future__ import annotations

import json
import random
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pycompress.model_description import DESCRIPTION
from pycompress.model_file import ModelFileError, load_model, read_model_header, save_model, tensor_sizes
from pycompress.model_file_coding import CODERS, Part, decode_bytes, decode_stream
from pycompress.model_file_reader import DATA
from pycompress.tensor_file import TensorFile, TensorFileError, checksum, write_tensors
from tests.model_file_models import compressed, fresh


def _snapshot(model: nn.Module) -> tuple[list[Any], list[bytes]]:
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    return list(model.named_modules()), [t.detach().flatten().view(torch.uint8).numpy().tobytes() for t in tensors]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The file with one to three faults: bits, bytes, texts, lengths, pieces moved, cut off or doubled."""
    result = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        # As often in the header as in all the values behind it.
        at = rng.randrange(min(header, len(result))) if rng.random() < 0.6 else rng.randrange(len(result))
        kind = rng.randrange(7)
        if kind == 0:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[at] = rng.randrange(256)
        elif kind == 2:
            result[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
        elif kind == 3:
            del result[rng.randrange(1, len(result)) :]
        elif kind == 4:
            result += rng.randbytes(rng.randrange(1, 40))
        elif kind == 5:
            numbers = (b"0", b"-1", b"9999999999999", b"1e9", b"null", b"[]", b"true", b"9" * 5000, b"[" * 3000)
            result[at : at + rng.randrange(3)] = rng.choice(numbers)
        else:
            source = rng.randrange(len(result))
            result[at:at] = result[source : source + rng.randrange(1, 60)]
        if not result:
            return bytes(data[:3])
    return bytes(result)


def described(data: bytes, rng: random.Random) -> bytes:
    """The compact file with a fault inside its deflated description, everything around it sound."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    begin, end = header[DESCRIPTION]["data_offsets"]
    text = zlib.decompress(data[8 + length + begin : 8 + length + end], -15)
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    coded = coder.compress(mutated(len(text).to_bytes(8, "little") + text, rng)[8:]) + coder.flush()
    values = data[8 + length :][slice(*header[DATA]["data_offsets"])]
    header["__metadata__"]["sum"] = str(checksum(coded))
    header[DATA].update(data_offsets=[0, len(values)])
    header[DESCRIPTION].update(shape=[len(coded)], data_offsets=[len(values), len(values) + len(coded)])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values + coded


def _again_summed(data: bytes) -> bytes:
    """The file with checksums that are right again, where it is sound enough to have any: what is behind them then."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        values = data[8 + length :]
        if DESCRIPTION in header:
            total = checksum(values[slice(*header[DESCRIPTION]["data_offsets"])])
        else:
            description = json.loads(header["__metadata__"][DESCRIPTION])
            for name in description["sums"]:
                description["sums"][name] = checksum(values[slice(*header[name]["data_offsets"])])
            header["__metadata__"][DESCRIPTION] = text = json.dumps(description)
            total = checksum(text.encode())
        header["__metadata__"]["sum"] = str(total)
        text = json.dumps(header)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return data
    return len(text).to_bytes(8, "little") + text.encode(errors="replace") + values


def survive(data: bytes, path: Path, name: str) -> bool:
    """Whether the file still loads. Anything but that or a clear error, with the model unchanged, fails."""
    path.write_bytes(data)
    model = fresh(name, "cpu")
    before = _snapshot(model)
    tracemalloc.start()
    try:
        load_model(path, model)
        tensor_sizes(path)
        said = ""
    except TensorFileError as error:
        said = str(error)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8_000_000, most  # lzma's dictionary, 4 MiB, and JSON of some kB as objects
    if said:
        assert str(path) in said
        assert _snapshot(model) == before
    return not said


@pytest.mark.parametrize("name", ["sparse int8", "qat static, masked", "encoder shrunk"])
@pytest.mark.parametrize(("compact", "fault"), [(False, mutated), (True, mutated), (True, described)])
def test_mutations(name: str, compact: bool, fault: Callable[[bytes, random.Random], bytes], tmp_path: Path) -> None:
    model, _ = compressed(name)
    save_model(model, tmp_path / "sound", compact=compact)
    data = (tmp_path / "sound").read_bytes()
    assert survive(data, tmp_path / "m.safetensors", name)
    rng = random.Random(1)
    faulty = [fault(data, rng) for _ in range(30)]
    if fault is mutated:
        assert not any(survive(each, tmp_path / "m.safetensors", name) for each in faulty if each != data)
    for each in faulty:
        survive(_again_summed(each), tmp_path / "m.safetensors", name)


# ---- descriptions that lie ------------------------------------------------------------------------------------------


def _forged(tmp_path: Path, compact: bool, change: Callable[[dict[str, Any]], None], name: str) -> Path:
    """A sound file whose description was changed."""
    model, _ = compressed(name)
    path = tmp_path / "m.safetensors"
    save_model(model, path, compact=compact)
    header = read_model_header(path)
    change(header)
    text = json.dumps(header)
    with TensorFile(path) as file:
        tensors, metadata = {key: file.read(key) for key in file.entries}, dict(file.metadata)
    if compact:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15)
        coded = coder.compress(text.encode()) + coder.flush()
        tensors[DESCRIPTION] = torch.frombuffer(bytearray(coded), dtype=torch.uint8)
        metadata["sum"] = str(checksum(coded))
    else:
        metadata.update(description=text, sum=str(checksum(text.encode())))
    write_tensors(path, tensors, metadata)
    return path


def _set(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("structure", "layers", "0", "kind", value="Int3Linear"), "'Int3Linear', which .* update pycompress"),
        (_set("structure", "layers", "0", "bits", value=4), "does not know its option 'bits'; update pycompress"),
        (_set("structure", "layers", "0", "in_features", value=2**40), "in_features=1099511627776; expected a size"),
        (_set("structure", "layers", "0", "out_features", value=2**30), "build the model with the same sizes"),
        (_set("structure", "layers", "0", "activation", value="tan"), "layer '0' .*activation='tan', expected one of"),
        (_set("structure", "layers", "0", "bias", value=False), "without a bias, unlike the model's"),
        (_set("structure", "layers", "0", "format", value="csr"), "layer '0' .*csr"),
        (_set("structure", "layers", "0", "choice", value={"machine": "", "forms": [8, 7]}), "choice=.*expected"),
        (_set("structure", "layers", "9", value={"kind": "Identity"}), "the model has no layer '9'"),
        (_set("structure", "attributes", "0", value={"forward": 1}), "does not set forward=1 on a"),
        (_set("structure", "attributes", "0", value={"dim": 1}), "has no plain attribute 'dim'"),
        (_set("structure", "aliases", value={"0": ["x.y"]}), "has no layer 'x'"),
        (_set("structure", "later", value=1), "has 'later', which this version of pycompress does not know"),
        (_set("structure", "training", value="yes"), "'training' is a str, expected a bool"),
        (_set("tied", value={"0.bias": "2.weight_bitmap"}), "0.bias is torch.uint8"),
        (_set("tied", value={"0.bias": "nothing"}), "there is no tensor for 0.bias"),
        (_set("frozen", value=[1]), "no text"),
        (_set("tensors", value=[]), "no 'tensors' that is a dict"),
    ],
)
def test_a_lying_description_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, compact: bool, tmp_path: Path
) -> None:
    path = _forged(tmp_path, compact, change, "sparse int8")
    model = fresh("sparse int8", "cpu")
    before = _snapshot(model)
    with pytest.raises(TensorFileError, match=message):
        load_model(path, model)
    assert _snapshot(model) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["tensors"]["0.weight_bitmap"].__setitem__(1, [2**31, 4]), r"expected torch.uint8 \(48, 4\)"),
        (lambda h: h["tensors"]["0.weight_bitmap"].__setitem__(1, [2**31, 2**31]), "index entry of 0.weight_bitmap"),
        (lambda h: h["tensors"]["0.weight_values"].__setitem__(1, [10**12]), "with at most 1536 values"),
        (lambda h: h["tensors"]["0.weight_bitmap"].__setitem__(3, [5, 1]), "do not fit into 48 x 32|blocks of"),
        (lambda h: h["tensors"]["0.weight_bitmap"].__setitem__(3, [0, 1]), "index entry of 0.weight_bitmap"),
        (lambda h: h["tensors"]["0.weight_bitmap"].__setitem__(5, 2**40), "index entry of 0.weight_bitmap"),
        (lambda h: h["tensors"].__setitem__("0.bias", ["F32", [48], "bits", [1, 1], 0, 0]), "index entry of 0.bias"),
        (lambda h: h["tensors"].__setitem__("0.bias", ["F99", [48], "plain"]), "index entry of 0.bias"),
        (lambda h: h["streams"].pop("I8"), "streams are not those of its tensors"),
        (lambda h: h["streams"]["I8"][0].__setitem__(1, 10**15), "do not fill its data"),
        (lambda h: h["streams"]["I8"][0].__setitem__(0, "rle"), "'rle', which .* update pycompress"),
        (lambda h: h["streams"]["F32"].pop(), "has 3 planes"),
    ],
)
def test_a_lying_index_is_refused(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    path = _forged(tmp_path, True, change, "sparse int8")
    with pytest.raises(TensorFileError, match=message):
        load_model(path, fresh("sparse int8", "meta"))


def test_a_rank_that_no_factorization_has_is_refused(tmp_path: Path) -> None:
    """Two tensors of 2^31 rows of zeros are some bytes in a compact file."""
    change = _set("structure", "layers", "0", "rank", value=2**31 - 1)
    with pytest.raises(ModelFileError, match="its rank is 2147483647, above its 32 inputs or outputs"):
        load_model(_forged(tmp_path, True, change, "low rank"), fresh("low rank", "meta"))


def test_a_layer_inside_itself_is_refused(tmp_path: Path) -> None:
    change = _set("structure", "aliases", value={"0": ["0.down"]})
    with pytest.raises(ModelFileError, match=r"layer '0' would hold itself as '0\.down'"):
        load_model(_forged(tmp_path, False, change, "low rank"), fresh("low rank", "meta"))


def test_transient_buffers_without_a_place_are_not_decoded(tmp_path: Path) -> None:
    """They share streams with what is read, and would take 8 GB here."""
    model, _ = compressed("float")
    model.register_buffer("idle", torch.zeros(3), persistent=False)
    path = tmp_path / "m.safetensors"
    save_model(model, path, compact=True)
    load_model(path, fresh("float", "cpu"))  # some bytes do no harm
    with TensorFile(path) as file:
        tensors, metadata = {key: file.read(key) for key in file.entries}, dict(file.metadata)
    header = read_model_header(path)
    header["tensors"]["idle"] = ["F32", [2**31], "plain"]
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    coded = coder.compress(json.dumps(header).encode()) + coder.flush()
    tensors[DESCRIPTION] = torch.frombuffer(bytearray(coded), dtype=torch.uint8)
    write_tensors(path, tensors, {**metadata, "sum": str(checksum(coded))})
    with pytest.raises(ModelFileError, match="8589934592 bytes of its transient buffers have no place"):
        load_model(path, fresh("float", "cpu"))


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
def test_one_bit_of_the_values_is_found(compact: bool, tmp_path: Path) -> None:
    model, _ = compressed("float")
    path = tmp_path / "m.safetensors"
    save_model(model, path, compact=compact)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"is damaged: its checksum is .* The model is unchanged"):
        load_model(path, fresh("float", "cpu"))


def test_a_newer_version_says_what_to_do(tmp_path: Path) -> None:
    model, _ = compressed("float")
    path = tmp_path / "m.safetensors"
    save_model(model, path)
    with TensorFile(path) as file:
        tensors = {key: file.read(key) for key in file.entries}
        write_tensors(path, tensors, {**file.metadata, "version": "2"})
    with pytest.raises(ModelFileError, match="has version '2' and this pycompress reads 1; update pycompress"):
        load_model(path, fresh("float", "cpu"))


# ---- coders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("data", [b"", b"a", bytes(range(256)) * 40, b"\0" * 1_000_000])
def test_coders_give_back_what_they_took(name: str, data: bytes) -> None:
    assert decode_bytes(name, CODERS[name].encode(data), len(data), "x") == data


@pytest.mark.parametrize("name", CODERS)
def test_a_bomb_is_stopped_at_the_expected_length(name: str) -> None:
    coded = CODERS[name].encode(b"\0" * 20_000_000)
    tracemalloc.start()
    with pytest.raises(TensorFileError, match="x is damaged: it decodes to more than 1000 bytes, expected 1000"):
        decode_bytes(name, coded, 1000, "x")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < len(coded) + 5_000_000  # lzma's dictionary; what is not read yet


@pytest.mark.parametrize("name", CODERS)
def test_less_or_more_than_expected_is_damage(name: str) -> None:
    coded = CODERS[name].encode(bytes(range(100)))
    for data in (coded[:-1], coded + b"\0", CODERS[name].encode(bytes(99)), CODERS[name].encode(bytes(101))):
        with pytest.raises(TensorFileError, match="x is damaged"):
            decode_bytes(name, data, 100, "x")


def test_a_lying_length_allocates_nothing() -> None:
    part = Part("F32", [2**20, 2**20])
    tracemalloc.start()
    with pytest.raises(TensorFileError, match="x is damaged"):
        decode_stream([("huffman", CODERS["huffman"].encode(bytes(9)))] * 4, 4, part.lengths()["F32"], "x")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1_000_000
