"""The import contracts hold on the tree, and lint-imports really fails on a tree that breaks them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")

pytestmark = pytest.mark.skipif(not LINT_IMPORTS.exists(), reason="import-linter is not installed (extra: dev)")


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LINT_IMPORTS), "--no-logo", "--no-cache"], cwd=root, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources and the contracts, free to be spoilt."""
    for package in ("ptq4arvg", "ptq4arvg_kernels"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "assets", "*.so")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_tree_keeps_its_contracts() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ", 0 broken" in result.stdout


def test_an_untouched_copy_passes(copy: Path) -> None:
    # Otherwise the failures below could have any reason.
    result = lint(copy)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("package", "line", "contract"),
    [
        ("ptq4arvg_kernels", "import ptq4arvg", "The kernels know nothing"),
        (
            "ptq4arvg_kernels",
            "def late():\n    from ptq4arvg.errors import CheckpointError",
            "The kernels know nothing",
        ),
        ("ptq4arvg/calibration", "from ptq4arvg.models import tokenizers", "Calibration sees models only"),
        ("ptq4arvg/calibration", "import ptq4arvg.models.tokenizers.maskgit_vqgan", "Calibration sees models only"),
    ],
)
def test_a_bad_import_breaks_its_contract(copy: Path, package: str, line: str, contract: str) -> None:
    (copy / package / "spoilt.py").write_text(line + "\n")
    result = lint(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    broken = [text for text in result.stdout.splitlines() if text.endswith("BROKEN")]
    assert len(broken) == 1
    assert broken[0].startswith(contract)
    assert "spoilt" in result.stdout
