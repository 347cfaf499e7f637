"""The command line: what works end to end, and that errors are one readable line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from ptq4arvg import __version__
from ptq4arvg.cli import app, class_list
from ptq4arvg.models.bundled import ASSETS
from ptq4arvg.models.rar import CONFIGS, RAR
from ptq4arvg.models.tokenizers import MaskGitVQGAN

HEAVY = ("torch", "matplotlib", "scipy", "triton")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def works(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: str | Path, code: int = 1) -> str:
    """The message of a command that must fail in a readable way."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    if code == 1:
        assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "w6a8.safetensors"
    out = works("quantize", "bundled", path, "--recipe", "w6a8", "--samples", "8")
    assert "w6a8" in out
    return path


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from ptq4arvg.cli import app\n"
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0, result.output\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_every_command() -> None:
    text = works("--help")
    for command in ("demo", "quantize", "generate", "info", "doctor"):
        assert command in text


@pytest.mark.parametrize("command", ["info", "doctor"])
def test_the_installation_describes_itself(command: str) -> None:
    text = works(command)
    assert __version__ in text
    assert torch.__version__ in text
    assert "reference" in text


def test_quantized_checkpoint_is_described(quantized: Path) -> None:
    text = works("info", quantized)
    for word in ("rar", "w6a8", "128", "MB"):
        assert word in text


def test_bundled_weights_are_described() -> None:
    text = works("info", ASSETS / "generator.safetensors")
    assert "float16" in text
    assert "MB" in text


def test_quantized_checkpoint_is_smaller_than_fp16(quantized: Path) -> None:
    assert quantized.stat().st_size < 0.6 * (ASSETS / "generator.safetensors").stat().st_size


@pytest.mark.parametrize("source", ["bundled", "stress", "file"])
def test_pictures_are_drawn(source: str, quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "grid.png"
    model = quantized if source == "file" else source
    text = works("generate", model, out, "--classes", "1,7-8", "--per-class", "2", "--seed", "3")
    assert "6 pictures" in text
    pixels = np.asarray(Image.open(out))
    assert pixels.ndim == 2
    assert pixels.shape[0] > pixels.shape[1] > 200  # three rows of two pictures, enlarged
    assert pixels.std() > 40


def test_the_seed_decides_the_picture(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        works("generate", "bundled", tmp_path / f"{name}.png", "--classes", "1", "--per-class", "1", "--seed", seed)
    first, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == again != other


def test_a_published_checkpoint_is_recognised_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A miniature stands in for the published sizes; its tokenizer has the published widths, with random weights."""
    config = type(CONFIGS["rar_b"])(
        dim=32, depth=1, heads=2, mlp_dim=32, classes=12, grid=2, pos_rows=6, time_rows=6, guidance=2.0
    )
    monkeypatch.setitem(CONFIGS, "rar_b", config)
    weights = RAR(config).initialize(torch.Generator().manual_seed(0), std=0.2).state_dict()
    path, tokenizer, out = tmp_path / "rar_b.bin", tmp_path / "tokenizer.safetensors", tmp_path / "grid.png"
    torch.save(weights, path)
    save_file(MaskGitVQGAN().state_dict(), tokenizer)
    works("generate", path, out, "--tokenizer", tokenizer, "--classes", "11", "--per-class", "2")
    assert np.asarray(Image.open(out)).shape[2] == 3
    assert "--tokenizer" in fails("generate", path, out, "--classes", "11")


@pytest.mark.parametrize(
    ("text", "classes"), [("3", [3]), ("0,4,7", [0, 4, 7]), ("0-2", [0, 1, 2]), (" 9 , 0-1", [9, 0, 1])]
)
def test_class_lists(text: str, classes: list[int]) -> None:
    assert class_list(text, 10) == classes


@pytest.mark.parametrize(
    ("text", "message"),
    [("10", "class 10 is out of range"), ("0-12", "class 10"), ("a", "'a' is not a class"), ("", "not a class"),
     ("-1", "'-1' is not"), ("1-", "'1-' is not"), ("5-3", "names no class")],
)  # fmt: skip
def test_wrong_class_lists(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_list(text, 10)


def test_errors_are_readable(tmp_path: Path, quantized: Path) -> None:
    out, png = tmp_path / "q.safetensors", tmp_path / "g.png"
    damaged, foreign = tmp_path / "damaged.safetensors", tmp_path / "foreign.safetensors"
    damaged.write_bytes(quantized.read_bytes()[:50_000])
    save_file({"weight": torch.zeros(3)}, foreign)
    assert "'rar_q'" in fails("quantize", "rar_q", out)
    assert "--checkpoint" in fails("quantize", "rar_b", out)
    assert "drop --checkpoint" in fails("quantize", "bundled", out, "--checkpoint", "x.bin")
    assert "nowhere.bin" in fails("quantize", "rar_b", out, "--checkpoint", tmp_path / "nowhere.bin")
    assert "w5a5" in fails("quantize", "bundled", out, "--recipe", "w5a5", "--samples", "2")
    assert "at least one sample, got 0" in fails("quantize", "bundled", out, "--samples", "0")
    assert "q.safetensors" in fails("quantize", "bundled", tmp_path / "q.bin")
    assert not out.exists()
    assert "class 10 is out of range" in fails("generate", "bundled", png, "--classes", "10")
    assert "at least 1" in fails("generate", "bundled", png, "--per-class", "0")
    assert "g.png" in fails("generate", "bundled", tmp_path / "g.jpg")
    assert "drop --tokenizer" in fails("generate", "bundled", png, "--tokenizer", "t.bin")
    assert "nowhere" in fails("generate", tmp_path / "nowhere", png)
    assert "damaged.safetensors" in fails("generate", damaged, png)
    assert "foreign.safetensors" in fails("generate", foreign, png)
    assert "damaged.safetensors" in fails("info", damaged)
    assert "too few" in fails("demo", "--images", "3", "--out", tmp_path)
    assert not png.exists()


def test_wrong_usage_is_refused_by_the_parser() -> None:
    assert "No such command" in fails("quantise", code=2)
    assert "Missing argument" in fails("quantize", code=2)
    assert "valid integer" in fails("demo", "--images", "abc", code=2)
