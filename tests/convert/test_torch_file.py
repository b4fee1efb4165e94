"""`.bin` files: read without PyTorch, and nothing in them is run."""

import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from baichuan_jax.convert.torch_file import open_torch_file
from tests.convert import releases
from tests.goldens import make_torch_bin

GOLDEN = Path(make_torch_bin.__file__).with_name("torch_save.bin")


def check_golden(path: Path) -> None:
    expected, found = make_torch_bin.tensors(), open_torch_file(path)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name].read(), x)
        np.testing.assert_array_equal(found[name].read(1, 2), x[1:2])


def test_reads_what_pytorch_saved():
    check_golden(GOLDEN)


@pytest.mark.oracle
def test_reads_what_pytorch_saves_now(tmp_path):
    make_torch_bin.write(tmp_path / "new.bin")
    check_golden(tmp_path / "new.bin")


@pytest.mark.oracle
def test_pytorch_reads_what_the_tests_write(tmp_path):
    import torch

    x = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    releases.write_bin(tmp_path / "x.bin", {"x": x})
    loaded = torch.load(tmp_path / "x.bin", weights_only=True)["x"]
    assert loaded.dtype == torch.bfloat16
    np.testing.assert_array_equal(loaded.float().numpy(), x.astype(np.float32))


def archive(path: Path, pickled: bytes, storages=None) -> Path:
    releases.write_archive(path, pickled, {"0": bytes(64)} if storages is None else storages)
    return path


class Attack:
    """Its pickle calls `function` when it is loaded."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def protocol_2(value) -> bytes:
    """A pickled value without header and end, to be put into another pickle."""
    return pickle.dumps(value, 2)[2:-1]


def malicious(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would write `marker`, and the name by which each is refused."""
    import os

    command = f"touch {marker}"
    tensor = releases.pickled_tensor("FloatStorage", "0", 4, 0, [4], [1])
    system = protocol_2(Attack(os.system, command))
    name = f"{os.system.__module__}.system"
    evaluated = protocol_2(Attack(eval, f"open({str(marker)!r}, 'w')"))
    loads = protocol_2(Attack(pickle.loads, pickle.dumps(Attack(os.system, command))))
    return {
        "alone": (b"\x80\x02" + system + b".", name),
        "beside a tensor": (releases.pickled_dict({"w": tensor, "x": system}), name),
        "inside a tensor": (
            releases.pickled_dict({"w": tensor.replace(b"\x89", b"\x89" + system)}),
            name,
        ),
        "eval": (releases.pickled_dict({"x": evaluated}), "__builtin__.eval"),
        "pickle in a pickle": (releases.pickled_dict({"x": loads}), "pickle.loads"),
        "as the key of a storage": (
            releases.pickled_dict({"w": tensor.replace(releases.text("0"), system)}),
            name,
        ),
        "another function of torch": (
            releases.pickled_dict({"x": b"ctorch.hub\nload\n(" + releases.text("a") + b"tR"}),
            "torch.hub.load",
        ),
        "a rebuild that executes": (
            releases.pickled_dict({"x": b"ctorch._utils\n_rebuild_parameter\n)R"}),
            "torch._utils._rebuild_parameter",
        ),
        "a part of an allowed module": (
            releases.pickled_dict({"x": b"ccollections\nnamedtuple\n)R"}),
            "collections.namedtuple",
        ),
        "a dotted name": (
            b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93)R.",
            "collections.OrderedDict.fromkeys",
        ),
    }


@pytest.mark.parametrize("kind", malicious(Path("unused")))
def test_what_a_pickle_would_run_is_refused_by_name_and_not_run(tmp_path, kind):
    pickled, name = malicious(tmp_path / "ran")[kind]
    path = archive(tmp_path / "evil.bin", pickled)
    with pytest.raises(ValueError, match=rf"evil.bin: its pickle asks for {name}, "):
        open_torch_file(path)
    assert not (tmp_path / "ran").exists()


def test_the_attacks_are_real(tmp_path):
    """Or the test above could not fail."""
    for kind in ("alone", "eval"):
        pickled, _ = malicious(tmp_path / "ran")[kind]
        pickle.loads(pickled)
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()


def test_attributes_cannot_be_set_on_what_stays(tmp_path):
    """BUILD writes attributes; the stand-ins have none, and functions are made anew."""
    build = b"ctorch._utils\n_rebuild_tensor_v2\n}" + releases.text("x") + b"Nsb0"
    tensor = releases.pickled_tensor("FloatStorage", "0", 4, 0, [4], [1])
    spoilt = tensor + b"N}" + releases.text("shape") + b"Ns\x86b"
    for items in ({"w": tensor + b"}" + releases.text("shape") + b"Nsb"}, {"w": spoilt}):
        path = archive(tmp_path / "build.bin", releases.pickled_dict(items))
        with pytest.raises(ValueError, match=r"build.bin: its pickle is damaged"):
            open_torch_file(path)
    archive(tmp_path / "function.bin", b"\x80\x02" + build + b"}.")
    assert open_torch_file(tmp_path / "function.bin") == {}


def test_the_old_format_is_refused(tmp_path):
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    (tmp_path / "old.bin").write_bytes(magic + pickle.dumps(1001, protocol=2))
    with pytest.raises(ValueError, match=r"old.bin is in the format of PyTorch before 1.6"):
        open_torch_file(tmp_path / "old.bin")


@pytest.mark.oracle
def test_the_old_format_of_pytorch_itself_is_refused(tmp_path):
    import torch

    torch.save({"x": torch.ones(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old.bin is in the format of PyTorch before 1.6"):
        open_torch_file(tmp_path / "old.bin")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99, -1])
def test_a_file_cut_short_is_refused(tmp_path, kept):
    data = GOLDEN.read_bytes()
    kept = int(kept * len(data)) if isinstance(kept, float) else kept
    (tmp_path / "cut.bin").write_bytes(data[:kept])
    with pytest.raises(ValueError, match=r"cut.bin is not a whole file of torch.save"):
        open_torch_file(tmp_path / "cut.bin")


def test_a_flipped_bit_is_found_by_name(tmp_path):
    with zipfile.ZipFile(GOLDEN) as file:
        largest = max(file.infolist(), key=lambda info: "/data/" in info.filename)
    data = bytearray(GOLDEN.read_bytes())
    begin = largest.header_offset + 30
    begin += sum(struct.unpack("<HH", data[begin - 4 : begin]))
    data[begin + 1] ^= 1
    (tmp_path / "flipped.bin").write_bytes(data)
    tensors = open_torch_file(tmp_path / "flipped.bin")
    with pytest.raises(ValueError, match=r"flipped.bin: [a-z0-9.]+ is damaged: its checksum"):
        for tensor in tensors.values():
            tensor.read()


TENSOR = ("FloatStorage", "0", 4)


@pytest.mark.parametrize(
    "pickled, said",
    [
        (releases.pickled_tensor(*TENSOR, 0, [17], [1]), "w needs 68 bytes of its storage data/0"),
        (releases.pickled_tensor(*TENSOR, 1 << 40, [4], [1]), "w needs 4,398,046,511,120 bytes"),
        (releases.pickled_tensor(*TENSOR, -1, [4], [1]), "w: its description is damaged"),
        (releases.pickled_tensor(*TENSOR, 0, [4], [-1]), "w: its description is damaged"),
        (releases.pickled_tensor(*TENSOR, 0, [4], [1, 1]), "w: its description is damaged"),
        (
            releases.pickled_tensor("FloatStorage", "7", 4, 0, [4], [1]),
            "w: its storage data/7 is missing",
        ),
        (releases.text("words"), "w is a str; it should be a tensor"),
        (b"}", "w is a dict; it should be a tensor"),
        (b"\xff", "its pickle is damaged"),
    ],
)
def test_descriptions_are_not_taken_on_trust(tmp_path, pickled, said):
    path = archive(tmp_path / "odd.bin", releases.pickled_dict({"w": pickled}))
    with pytest.raises(ValueError, match=rf"odd.bin: {said}"):
        open_torch_file(path)


def test_other_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as file:
        file.writestr("readme.txt", "no model")
    with pytest.raises(ValueError, match=r"other.bin is a zip archive, but not one of torch.save"):
        open_torch_file(tmp_path / "other.bin")
    archive(tmp_path / "list.bin", b"\x80\x02].")
    with pytest.raises(ValueError, match=r"list.bin holds a list; it should be a state dict"):
        open_torch_file(tmp_path / "list.bin")
    tensor = releases.pickled_tensor(*TENSOR, 0, [4], [1])
    with zipfile.ZipFile(tmp_path / "packed.bin", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("packed/data.pkl", releases.pickled_dict({"w": tensor}))
        file.writestr("packed/data/0", bytes(64))
    with pytest.raises(ValueError, match=r"packed.bin: w: its storage is compressed"):
        open_torch_file(tmp_path / "packed.bin")
    with zipfile.ZipFile(tmp_path / "big.bin", "w") as file:
        file.writestr("big/data.pkl", releases.pickled_dict({}))
        file.writestr("big/byteorder", "big")
    with pytest.raises(ValueError, match=r"big.bin: its byte order is 'big'"):
        open_torch_file(tmp_path / "big.bin")


def test_quantised_checkpoints_are_refused_by_name(tmp_path):
    tensor = releases.pickled_tensor("ByteStorage", "0", 4, 0, [4], [1])
    shape = b"ctorch\nSize\n(" + releases.numbers([4, 4]) + b"tR"
    state = b"](" + tensor + shape + b"ctorch\nfloat16\n" + releases.text("nf4") + b"e"
    items = {"a.weight.data": tensor, "a.weight.quant_state": state}
    path = archive(tmp_path / "q.bin", releases.pickled_dict(items))
    with pytest.raises(ValueError, match=r"q.bin: a.weight.quant_state belongs to a quantised"):
        open_torch_file(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_numbers_that_are_not_finite_are_named(tmp_path, bad, dtype):
    x = np.ones((3, 4), dtype)
    x[2, 1] = bad
    releases.write_bin(tmp_path / "bad.bin", {"w": x, "fine": np.ones(3, dtype)})
    tensors = open_torch_file(tmp_path / "bad.bin")
    tensors["fine"].read()
    with pytest.raises(ValueError, match=rf"bad.bin: w holds {bad} at \[2, 1\]: weights must be"):
        tensors["w"].read(1)
    tensors["w"].read(0, 2)
