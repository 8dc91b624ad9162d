"""The restricted unpickler: reads what torch writes, runs nothing, survives every damage."""

import collections
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmill.encoders import torchfile
from patchmill.encoders.torchfile import RefusedError, TorchFile

ZIP, LEGACY = True, False
both = pytest.mark.parametrize("new", [ZIP, LEGACY])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def saved(value: object, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def read(data: bytes, folder) -> dict[str, np.ndarray]:
    (folder / "w.pth").write_bytes(data)
    file = TorchFile(folder / "w.pth")
    found = {name: file.read(name) for name in file.shapes}
    assert {name: tensor.shape for name, tensor in found.items()} == file.shapes
    return found


@both
def test_every_dtype_and_every_view(new, tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    state = collections.OrderedDict({str(dtype): base.to(dtype) for dtype in DTYPES})
    state |= {
        "bool": base > 7,
        "turned": base.permute(2, 0, 1),
        "part": base[1:, 2:],
        "flat": base[0, 0],
        "empty": base[:0],
    }
    state |= {"scalar": torch.tensor(3.5), "strided": base[::2, ::3], "spread": base[:1].expand(4, 4, 5)}
    found = read(saved(state, new), tmp_path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())
        assert found[name].dtype == tensor.numpy().dtype


@both
def test_bfloat16_is_widened(new, tmp_path):
    tensor = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    np.testing.assert_array_equal(read(saved({"a": tensor}, new), tmp_path)["a"], tensor.float().numpy())


class Evil:
    """Runs a command when unpickled by a naive reader."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@both
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "__builtin__.eval"),
        (getattr, "__builtin__.getattr"),
        (np.load, "numpy.load"),
    ],
)
def test_malicious_pickles_are_refused_by_name_and_not_run(new, function, name, tmp_path):
    trace = tmp_path / "ran"
    argument = f"touch {trace}" if function is os.system else f"open({str(trace)!r}, 'w')"
    data = saved({"a": torch.zeros(2), "b": Evil(function, argument)}, new)
    with pytest.raises(RefusedError, match=f"a call to {name}, which"):
        read(data, tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_are_refused(protocol, tmp_path):
    trace = tmp_path / "ran"
    with pytest.raises(RefusedError):
        read(pickle.dumps(Evil(os.system, f"touch {trace}"), protocol), tmp_path)
    assert not trace.exists()


@both
def test_a_whole_model_is_refused(new, tmp_path):
    with pytest.raises(RefusedError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read(saved(torch.nn.Linear(2, 2), new), tmp_path)


@both
@pytest.mark.parametrize("value", [[torch.zeros(2)], {3: torch.zeros(2)}, torch.zeros(2), 5])
def test_what_is_no_state_dict_is_refused(new, value, tmp_path):
    with pytest.raises(RefusedError, match=r"dictionary|damaged"):
        read(saved(value, new), tmp_path)


def rewritten(data: bytes, change) -> bytes:
    """A zip checkpoint with its pickle changed."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            copy.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return target.getvalue()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x04K\x05\x86", b"K\x04K\x06\x86"),  # a longer side than there are numbers
        (b"K\x05K\x01\x86", b"K\x07K\x01\x86"),  # a larger stride
        (b"K\x14tq", b"K\x15tq"),  # more numbers than are stored
        (b"K\x05K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86"),  # a negative stride
    ],
)
def test_tensors_beyond_their_numbers_are_refused(old, new, tmp_path):
    data = saved({"a": torch.arange(20.0).reshape(4, 5)}, ZIP)
    changed = rewritten(data, lambda pickled: pickled.replace(old, new, 1))
    assert changed != rewritten(data, lambda pickled: pickled)
    with pytest.raises(RefusedError, match=r"beyond|described|unknown way"):
        read(changed, tmp_path)


def test_a_compressed_bomb_is_refused_unread(tmp_path):
    data, target = saved({"a": torch.zeros(20)}, ZIP), io.BytesIO()
    source = zipfile.ZipFile(io.BytesIO(data))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in source.namelist():
            copy.writestr(name, bytes(50_000_000) if "/data/" in name else source.read(name))
    with pytest.raises(RefusedError, match="stores 50000000 bytes where 80 are described"):
        read(target.getvalue(), tmp_path)


def test_a_flipped_bit_in_the_numbers_is_found(tmp_path):
    data = bytearray(saved({"a": torch.full((1000,), 1.5)}, ZIP))
    place = bytes(data).index(np.full(8, 1.5, np.float32).tobytes())
    data[place + 40] ^= 1
    with pytest.raises(RefusedError, match="BadZipFile"):
        read(bytes(data), tmp_path)


WHOLE = {new: saved({"a": torch.arange(20.0), "b": torch.ones(3, 3)}, new) for new in (ZIP, LEGACY)}


@both
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_but_never_crash(new, data, tmp_path_factory):
    whole = bytearray(WHOLE[new])
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for _ in range(data.draw(st.integers(0, 3))):
        if whole:
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(whole), tmp_path_factory.getbasetemp())
    except RefusedError:
        return
    assert all(isinstance(array, np.ndarray) for array in found.values())


@pytest.mark.parametrize(("place", "value"), [(6, 99), (8, 1)])  # in its entry of the directory
def test_an_archive_of_another_version_or_encrypted_is_refused(place, value, tmp_path):
    damaged = bytearray(WHOLE[ZIP])
    entry = damaged.index(b"PK\x01\x02")
    damaged[entry + place] = value
    with pytest.raises(RefusedError, match=r"no \.pth file"):
        read(bytes(damaged), tmp_path)


@both
def test_every_truncation_of_a_file_is_refused(new, tmp_path):
    whole = WHOLE[new]
    for length in range(0, len(whole) - 1, max(1, len(whole) // 100)):
        with pytest.raises(RefusedError):
            read(whole[:length], tmp_path)


class Changed:
    """Described well, and changed by the pickle's next opcode, BUILD."""

    def __init__(self, **state):
        self.state = state

    def __reduce__(self):
        storage = torch.arange(20.0).untyped_storage()
        described = (
            torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32),
            0,
            (4, 5),
            (5, 1),
            False,
            {},
        )
        return torch._utils._rebuild_tensor_v2, described, self.state


@both
@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("state", [{"offset": -8}, {"stride": (-64, 1)}, {"size": (10**9, 5)}, {"storage": None}])
def test_a_tensor_is_not_changed_after_it_was_described(new, state, tmp_path):
    """Else numbers would be cut out of memory that is not the file's."""
    with pytest.raises(RefusedError, match="changes a tensor after it was described"):
        read(saved({"a": Changed(**state)}, new), tmp_path)


def test_a_description_that_is_a_bomb_is_refused_unread(tmp_path):
    source, target = zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(2)}, ZIP))), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in source.namelist():
            copy.writestr(name, bytes(100 << 20) if name.endswith("data.pkl") else source.read(name))
    with pytest.raises(RefusedError, match="describes more than weights can have"):
        read(target.getvalue(), tmp_path)


@pytest.mark.parametrize("opcode", [b"r" + struct.pack("<I", 1 << 30), b"p1073741824\n"])
def test_a_memo_that_is_larger_than_the_description_is_refused_unmade(opcode, tmp_path):
    """The unpickler would make an array with that many places, of 8 bytes each, for a file of 200 bytes."""
    hostile = b"\x80\x02}" + opcode + b"."
    changed = rewritten(saved({"a": torch.zeros(2)}, ZIP), lambda pickled: hostile)
    with pytest.raises(RefusedError, match="remembers more than it describes"):
        read(changed, tmp_path)
    old = saved({}, LEGACY)
    described = pickle.dumps({}, 2)
    assert old.count(described) == 1
    with pytest.raises(RefusedError, match="remembers more than it describes"):
        read(old.replace(described, hostile), tmp_path)


def test_an_old_file_whose_description_has_no_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torchfile, "MOST_DESCRIBING", 500)
    endless = {f"weight {number}": 0 for number in range(100)}
    with pytest.raises(RefusedError, match="describes more than weights can have"):
        read(saved(endless, LEGACY), tmp_path)
