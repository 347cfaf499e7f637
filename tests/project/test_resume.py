"""An interrupted `make check-full` goes on where it stopped, and starts anew when the tree has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
TESTS = {
    "tests/test_a.py": "def test_one(): pass\ndef test_two(): pass\n",
    # Fails until the file is there; the file is not part of the sources, so the fingerprint stays.
    "tests/test_b.py": "import pathlib\ndef test_three(): assert pathlib.Path('repaired').exists()\n",
}


@pytest.fixture
def tree(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Flags that the surrounding run may have received.
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyprojecttoml("[tool.pytest.ini_options]\ntestpaths = ['tests']\n")
    for name, text in TESTS.items():
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return pytester


def run(tree: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return tree.runpytest_subprocess("-p", "tests.resume", "--resume", "out/done.jsonl", *arguments)


@pytest.mark.parametrize("arguments", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_passed_tests_are_left_out_until_the_tree_changes(tree: pytest.Pytester, arguments: tuple[str, ...]) -> None:
    first = run(tree, *arguments)
    assert first.ret == pytest.ExitCode.TESTS_FAILED
    first.assert_outcomes(passed=2, failed=1)

    (tree.path / "repaired").touch()
    second = run(tree, *arguments)
    assert second.ret == pytest.ExitCode.OK
    second.stdout.fnmatch_lines(["*1 passed, *2 passed_before in *"])

    third = run(tree, *arguments)
    assert third.ret == pytest.ExitCode.OK
    third.stdout.fnmatch_lines(["* 3 passed_before in *"])

    with (tree.path / "tests" / "test_a.py").open("a") as file:
        file.write("def test_four(): pass\n")
    fourth = run(tree, *arguments)
    assert fourth.ret == pytest.ExitCode.OK
    fourth.assert_outcomes(passed=4)


def test_a_line_cut_short_costs_only_its_own_test(tree: pytest.Pytester) -> None:
    (tree.path / "repaired").touch()
    run(tree).assert_outcomes(passed=3)
    record = tree.path / "out" / "done.jsonl"
    whole = record.read_text().rstrip("\n")
    assert json.loads(whole.splitlines()[-1]) == {"passed": "tests/test_b.py::test_three"}
    record.write_text(whole[:-5])
    run(tree).assert_outcomes(passed=1)
    run(tree).assert_outcomes()


def test_a_test_whose_teardown_fails_has_not_passed(tree: pytest.Pytester) -> None:
    (tree.path / "tests" / "test_b.py").write_text(
        "import pytest\n@pytest.fixture\ndef broken():\n    yield\n    assert False\ndef test_three(broken): pass\n"
    )
    run(tree).assert_outcomes(passed=3, errors=1)
    again = run(tree)
    again.assert_outcomes(passed=1, errors=1)
    assert again.ret == pytest.ExitCode.TESTS_FAILED


def test_nothing_to_run_at_all_is_still_an_error(tree: pytest.Pytester) -> None:
    for name in TESTS:
        (tree.path / name).unlink()
    assert run(tree).ret == pytest.ExitCode.NO_TESTS_COLLECTED
