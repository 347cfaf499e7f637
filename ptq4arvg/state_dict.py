"""Reading, checking and writing the tensors of a model.

Files come from elsewhere, so nothing in them is trusted: pickles are read without executing code, and whatever is wrong
with a file is said as a :class:`~ptq4arvg.errors.CheckpointError` that names the file.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import secrets
import stat
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ptq4arvg.errors import CheckpointError

__all__ = ["TensorFile", "check_fit", "load_strict", "read_state_dict", "write_safetensors_atomic"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")

# torch.save writes a zip archive; before version 1.6 it wrote a bare pickle of protocol 2 (or higher, on request).
ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
GIT_LFS_MAGIC = b"version https://git-lfs"
KNOWN_MAGIC = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF document",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}

# Training scripts save the state dict under one of these names.
WRAPPERS = ("model", "module", "state_dict")

# What torch.load is seen to raise on damaged input: besides its own complaints, whatever the unpickler trips over.
LOAD_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)

MAX_LISTED = 8


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a ``.bin``, ``.pt``, ``.pth`` (torch.save) or ``.safetensors`` file onto the CPU.

    A state dict that lies under ``model``, ``module`` or ``state_dict`` is unwrapped. Pickles are read with
    ``weights_only=True``; no code in them is executed. Zip archives are mapped into memory rather than read, so a large
    file is not held twice.

    Raises:
        CheckpointError: the file is missing, truncated, of another kind, contains code, or holds anything but named
            tensors.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the checkpoint file in it ({', '.join(SUFFIXES)})")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: unknown suffix {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path} is empty; download it again")
    if head.startswith(GIT_LFS_MAGIC):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`"
        )
    content = _read_safetensors(path, head) if path.suffix == ".safetensors" else _read_pickle(path, head)
    return _named_tensors(content, path)


def load_strict(module: nn.Module, state_dict: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Copy ``state_dict`` into ``module`` if it fits exactly; otherwise change nothing.

    Args:
        module: receives the values, in its own dtypes and on its own devices; not on the meta device.
        state_dict: one tensor for every entry of ``module.state_dict()`` and no other.
        source: where the tensors come from, for the messages.

    Raises:
        CheckpointError: lists missing and unexpected keys, different shapes, and integers where the module has floats
            (or the reverse).
    """
    target = module.state_dict()
    on_meta = [key for key, tensor in target.items() if tensor.is_meta]
    if on_meta:
        raise ValueError(
            f"cannot load into the meta device ({_listed(on_meta)}); call module.to_empty(device=...) first"
        )
    check_fit(module, state_dict, source)
    module.load_state_dict(dict(state_dict), strict=True)


def check_fit(module: nn.Module, state_dict: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """The checks of :func:`load_strict` alone; they look at names, shapes and dtypes, never at data.

    Raises:
        CheckpointError: as :func:`load_strict`.
    """
    target = module.state_dict()
    shared = [key for key in target if key in state_dict]
    problems = [
        ("missing", [key for key in target if key not in state_dict]),
        ("unexpected", [key for key in state_dict if key not in target]),
        (
            "of another shape",
            [
                f"{key} {list(state_dict[key].shape)} instead of {list(target[key].shape)}"
                for key in shared
                if state_dict[key].shape != target[key].shape
            ],
        ),
        (
            "of another kind of number",
            [
                f"{key} {_dtype(state_dict[key])} instead of {_dtype(target[key])}"
                for key in shared
                if state_dict[key].is_floating_point() != target[key].is_floating_point()
            ],
        ),
    ]
    found = [f"  {len(entries)} {kind}: {_listed(entries)}" for kind, entries in problems if entries]
    if found:
        raise CheckpointError(f"{source} does not fit {type(module).__name__}:\n" + "\n".join(found))


class TensorFile:
    """Reads the tensors of a safetensors file one by one, each into memory of its own.

    A mapped file stays in memory as long as any of its tensors; what is read here goes with the tensor.

    Args:
        path: a file that :func:`read_state_dict` has accepted.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = Path(path).open("rb")  # noqa: SIM115 (this object is the context manager)
        length = int.from_bytes(self._file.read(8), "little")
        self._entries: dict[str, Any] = json.loads(self._file.read(length))
        self._entries.pop("__metadata__", None)
        self._start = 8 + length

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        return list(self._entries)

    def read(self, key: str) -> Tensor:
        """The tensor called ``key``.

        Raises:
            CheckpointError: the file ends too early.
        """
        entry = self._entries[key]
        first, last = entry["data_offsets"]
        data = torch.empty(last - first, dtype=torch.uint8)
        self._file.seek(self._start + first)
        if self._file.readinto(data.numpy().data) != last - first:
            raise CheckpointError(f"{self._file.name} ends within {key}; copy the file again")
        return data.view(_SAFETENSORS_DTYPES[entry["dtype"]]).view(entry["shape"])


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write_safetensors_atomic(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file so that ``path`` always holds either the old content or the new, complete one.

    The data go to a temporary file in the same folder, are flushed to the disk, and then take the place of ``path``.
    When anything fails, an interrupt included, the temporary file is removed and ``path`` is as before. A symbolic link
    is followed.

    Args:
        path: the file to create or replace; its folder exists.
        tensors: dense tensors on any device; those that are not contiguous are copied.
        metadata: strings for the file's header.

    Raises:
        ValueError: two names share memory (save one of them, or a clone).
        OSError: the folder does not exist, is not writable or is full.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {target.parent} does not exist")
    dense = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    _refuse_shared_memory(dense)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        # safetensors creates files that only the owner may read; an empty file made here tells what the umask allows.
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            save_file(dense, temporary, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(target.parent)


def _read_safetensors(path: Path, head: bytes) -> object:
    kind = _known_kind(head)
    if kind is not None:
        raise CheckpointError(f"{path} is {kind}, not a safetensors file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or not a safetensors file ({error}); download it again"
        ) from error


def _read_pickle(path: Path, head: bytes) -> object:
    is_zip = head.startswith(ZIP_MAGIC)
    if not is_zip and not head.startswith(PICKLE_MAGIC):
        kind = _known_kind(head) or "of an unknown kind"
        raise CheckpointError(f"{path} is {kind}, not a PyTorch checkpoint (its first bytes are {head[:8]!r})")
    if is_zip and not _has_zip_directory(path):
        raise CheckpointError(f"{path} is truncated or damaged ({path.stat().st_size} bytes); download it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except LOAD_FAILURES as error:
        message = str(error)
        if isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in message:
            # The original message recommends weights_only=False, the one thing not to do with a file of unknown origin.
            name = re.search(r"GLOBAL (\S+)", message)
            if name is not None:
                raise CheckpointError(
                    f"{path} refers to Python code ({name[1]}) besides tensors and is not loaded, because loading "
                    "would run that code; if you trust its origin, extract the state dict and save it as .safetensors"
                ) from None
        reason = message.splitlines()[0][:200] if message else type(error).__name__
        raise CheckpointError(
            f"{path} is truncated, damaged or not a PyTorch checkpoint ({reason}); download it again"
        ) from error


def _has_zip_directory(path: Path) -> bool:
    """Whether the directory of the archive, which is at its end, is there."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _named_tensors(content: object, path: Path) -> dict[str, Tensor]:
    wrapped: Any = content
    if isinstance(content, Mapping):
        for name in WRAPPERS:
            if isinstance(content.get(name), Mapping):
                wrapped = content[name]
                break
    if not isinstance(wrapped, Mapping):
        raise CheckpointError(f"{path} holds a {type(wrapped).__name__}, not a state dict")
    if not wrapped:
        raise CheckpointError(f"{path} holds no tensors")
    for key, value in wrapped.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} is not a state dict: entry {key!r} is a {type(value).__name__}, not a named tensor"
            )
    return dict(wrapped)


def _refuse_shared_memory(tensors: Mapping[str, Tensor]) -> None:
    owners: dict[tuple[torch.device, int], str] = {}
    for key, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        memory = (tensor.device, tensor.untyped_storage().data_ptr())
        other = owners.setdefault(memory, key)
        if other != key:
            raise ValueError(f"{other!r} and {key!r} share memory; save one of them, or a clone")


def _flush(path: Path) -> None:
    """Force a file's data, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _known_kind(head: bytes) -> str | None:
    for magic, kind in KNOWN_MAGIC.items():
        if head.startswith(magic):
            return kind
    return None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(entries: Iterable[str]) -> str:
    entries = list(entries)
    shown = ", ".join(entries[:MAX_LISTED])
    return shown if len(entries) <= MAX_LISTED else f"{shown} and {len(entries) - MAX_LISTED} more"
