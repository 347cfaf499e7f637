"""Check that a wheel holds exactly the files of the two packages in the checkout, the assets among them, and the one
compiled module. The checkout may hold modules of other Python releases."""

import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ptq4arvg", "ptq4arvg_kernels")
COMPILED = re.compile(r"ptq4arvg_kernels/_cpu\.[\w-]+\.so")


def main(wheel: str) -> int:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected = {name for name in expected if not COMPILED.fullmatch(name)}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.split("/")[0] in PACKAGES}
    compiled = sorted(name for name in names if COMPILED.fullmatch(name))
    packed = names.difference(compiled)
    problems = [f"missing from the wheel: {name}" for name in sorted(expected - packed)]
    problems += [f"in the wheel but not in the checkout: {name}" for name in sorted(packed - expected)]
    assets = [name for name in packed if name.startswith("ptq4arvg/assets/")]
    if not assets:
        problems.append("the wheel holds no file under ptq4arvg/assets/")
    if len(compiled) != 1:
        problems.append(f"the wheel holds {len(compiled)} compiled modules instead of one: {compiled}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{wheel}: {len(packed)} files, {len(assets)} of them assets, and {compiled[0]}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
