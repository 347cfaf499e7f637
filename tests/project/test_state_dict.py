"""Checkpoint files: what is read, what is refused and with which words, and what an interrupted save leaves behind."""

from __future__ import annotations

import contextlib
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ptq4arvg.state_dict
from ptq4arvg.errors import CheckpointError
from ptq4arvg.state_dict import load_strict, read_state_dict, write_safetensors_atomic

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(200))
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a.weight": torch.randn(3, 5), "a.bias": torch.randn(3), "count": torch.arange(4)}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_torch_files(tensors: dict[str, Tensor], tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    assert_same(read_state_dict(path), tensors)
    assert_same(read_state_dict(str(path)), tensors)


def test_reads_safetensors(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "weights.safetensors")
    assert_same(read_state_dict(tmp_path / "weights.safetensors"), tensors)


@pytest.mark.parametrize("name", ["model", "module", "state_dict"])
def test_unwraps_training_checkpoints(tensors: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    torch.save({name: tensors, "step": 7, "optimizer": {"lr": 0.1}}, tmp_path / "training.pt")
    assert_same(read_state_dict(tmp_path / "training.pt"), tensors)


def test_reading_a_module_state_dict_keeps_buffers(tmp_path: Path) -> None:
    module = nn.BatchNorm1d(4)
    torch.save(module.state_dict(), tmp_path / "bn.pt")
    assert_same(read_state_dict(tmp_path / "bn.pt"), dict(module.state_dict()))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (PNG, "a PNG image"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (LFS_POINTER, "Git LFS pointer"),
        (b"", "is empty"),
        (b"dear reader, this is text and nothing else\n" * 20, "not a (PyTorch checkpoint|safetensors file)"),
        (bytes(4096), "not a (PyTorch checkpoint|safetensors file)"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, suffix: str, content: bytes, words: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.9, 0.999])
def test_truncated_files(tensors: dict[str, Tensor], tmp_path: Path, kind: str, keep: float) -> None:
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.bin")
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(data=st.data(), kind=st.sampled_from(["zip", "legacy", "safetensors"]))
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.bin")
    weights = {"a.weight": torch.ones(3, 5), "a.bias": torch.zeros(3)}
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    # The damage may have hit padding or the values of a tensor, so reading may succeed; nothing else may happen.
    with contextlib.suppress(CheckpointError):
        assert all(isinstance(value, Tensor) for value in read_state_dict(path).values())


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_with_code_are_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, victim = tmp_path / "evil.bin", tmp_path / "created-by-the-pickle"
    torch.save({"a": torch.ones(2), "b": Exploit(victim)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refers to Python code \(\S*mkdir\)") as caught:
        read_state_dict(path)
    assert not victim.exists()
    assert "weights_only" not in str(caught.value)
    # The file is a working exploit: read without care, it runs.
    torch.load(path, weights_only=False)
    assert victim.exists()


def test_a_plain_pickle_with_code_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "created-by-the-pickle"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Exploit(victim), protocol=2))
    with pytest.raises(CheckpointError):
        read_state_dict(tmp_path / "evil.pt")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "holds a list, not a state dict"),
        (torch.ones(2), "holds a Tensor"),
        ({}, "no tensors"),
        ({"model": {}}, "no tensors"),
        ({"a": torch.ones(2), "lr": 0.1}, "entry 'lr' is a float"),
        ({3: torch.ones(2)}, "entry 3 is a Tensor"),
    ],
)
def test_contents_that_are_no_state_dict(tmp_path: Path, content: object, words: str) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=words):
        read_state_dict(tmp_path / "odd.pt")


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.bin does not exist"):
        read_state_dict(tmp_path / "absent.bin")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_state_dict(tmp_path)
    (tmp_path / "weights.ckpt").write_bytes(PNG)
    with pytest.raises(CheckpointError, match=r"unknown suffix '\.ckpt'; expected one of \.bin, \.pt"):
        read_state_dict(tmp_path / "weights.ckpt")


# --- loading ----------------------------------------------------------------------------------------------------------


def test_load_strict_fills_a_module() -> None:
    source, target = nn.Linear(4, 3), nn.Linear(4, 3).double()
    load_strict(target, source.state_dict(), "memory")
    assert target.weight.dtype == torch.float64
    assert torch.equal(target.weight.float(), source.weight)
    assert torch.equal(target.bias.float(), source.bias)


def test_load_strict_lists_every_problem_and_changes_nothing() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    state = {"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3, dtype=torch.int64), "1.weight": torch.zeros(2, 4)}
    with pytest.raises(CheckpointError) as caught:
        load_strict(module, {**state, "2.weight": torch.zeros(1)}, "memory")
    assert str(caught.value).splitlines() == [
        "memory does not fit Sequential:",
        "  1 missing: 1.bias",
        "  1 unexpected: 2.weight",
        "  1 of another shape: 1.weight [2, 4] instead of [2, 3]",
        "  1 of another kind of number: 0.bias int64 instead of float32",
    ]
    assert_same(dict(module.state_dict()), before)


def test_load_strict_shortens_long_lists() -> None:
    module = nn.Sequential(*[nn.Linear(1, 1) for _ in range(10)])
    with pytest.raises(CheckpointError, match=r"20 missing: 0\.weight, 0\.bias, .* and 12 more"):
        load_strict(module, {}, "memory")


def test_load_strict_does_not_lose_values_on_the_meta_device() -> None:
    module = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match="to_empty"):
        load_strict(module, nn.Linear(2, 2).state_dict(), "memory")


# --- writing ----------------------------------------------------------------------------------------------------------


def test_write_round_trip_with_metadata(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    tensors["transposed"] = torch.arange(6.0).view(2, 3).T
    tensors["empty"] = torch.zeros(0, 4)
    tensors["trained"] = nn.Parameter(torch.ones(2))
    write_safetensors_atomic(path, tensors, {"format": "1"})
    assert_same(load_file(path), {key: tensor.detach() for key, tensor in tensors.items()})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "1"}
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_written_files_have_ordinary_permissions(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    write_safetensors_atomic(tmp_path / "out.safetensors", tensors)
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out.safetensors", "plain")}
    assert len(modes) == 1


def test_writing_through_a_link_keeps_the_link(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "store" / "real.safetensors")
    write_safetensors_atomic(link, tensors)
    assert link.is_symlink()
    assert_same(load_file(tmp_path / "store" / "real.safetensors"), tensors)


@pytest.mark.parametrize("stage", ["write", "flush", "replace"])
@pytest.mark.parametrize("failure", [OSError("no space left on device"), KeyboardInterrupt()])
def test_interrupted_save_leaves_the_old_file(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, failure: BaseException
) -> None:
    path = tmp_path / "out.safetensors"
    write_safetensors_atomic(path, tensors)
    old = path.read_bytes()

    def half_written(data: object, filename: Path, metadata: object = None) -> None:
        Path(filename).write_bytes(old[: len(old) // 2])
        raise failure

    def fail(*args: object) -> None:
        raise failure

    if stage == "write":
        monkeypatch.setattr(ptq4arvg.state_dict, "save_file", half_written)
    else:
        monkeypatch.setattr(os, {"flush": "fsync", "replace": "replace"}[stage], fail)
    with pytest.raises(type(failure)):
        write_safetensors_atomic(path, {key: tensor + 1 for key, tensor in tensors.items()})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_killed_save_leaves_the_old_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    write_safetensors_atomic(path, tensors)
    old = path.read_bytes()
    program = (
        "import os, signal, sys, torch\n"
        "from ptq4arvg.state_dict import write_safetensors_atomic\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_safetensors_atomic(sys.argv[1], {'a': torch.zeros(9)})\n"
    )
    root = Path(ptq4arvg.state_dict.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=root, timeout=120)
    assert done.returncode == -9
    assert path.read_bytes() == old


def test_refused_saves_leave_nothing(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="'a' and 'b' share memory"):
        write_safetensors_atomic(path, {"a": tensors["count"], "b": tensors["count"][1:]})
    with pytest.raises(TypeError):
        write_safetensors_atomic(path, tensors, {"version": 1})
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        write_safetensors_atomic(tmp_path / "nowhere" / "out.safetensors", tensors)
