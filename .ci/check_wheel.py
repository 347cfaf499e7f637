"""Check that a wheel holds exactly the files of the two packages in the checkout, the assets among them."""

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ptq4arvg", "ptq4arvg_kernels")


def main(wheel: str) -> int:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.split("/")[0] in PACKAGES}
    problems = [f"missing from the wheel: {name}" for name in sorted(expected - packed)]
    problems += [f"in the wheel but not in the checkout: {name}" for name in sorted(packed - expected)]
    assets = [name for name in packed if name.startswith("ptq4arvg/assets/")]
    if not assets:
        problems.append("the wheel holds no file under ptq4arvg/assets/")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{wheel}: {len(packed)} files, {len(assets)} of them assets")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
