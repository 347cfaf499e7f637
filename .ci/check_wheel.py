"""Check that a wheel holds exactly the files of the two packages in the checkout, the assets among them, and the
compiled modules: the CPU kernels and, where there is an nvcc, the CUDA kernels. The checkout may hold modules of other
Python releases."""

import re
import shutil
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ptq4arvg", "ptq4arvg_kernels")
COMPILED = re.compile(r"ptq4arvg_kernels/(_cpu|_cuda)\.[\w-]+\.so")
MAX_BYTES = 80_000_000


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
    modules = ["_cpu", *(["_cuda"] if shutil.which("nvcc") else [])]
    if [found.group(1) for found in map(COMPILED.fullmatch, compiled) if found] != modules:
        problems.append(f"the wheel holds the compiled modules {compiled} instead of one each of {modules}")
    size = Path(wheel).stat().st_size
    if size > MAX_BYTES:
        problems.append(f"the wheel has {size} bytes, more than {MAX_BYTES}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{wheel}: {size} bytes, {len(packed)} files, {len(assets)} of them assets, and {', '.join(compiled)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
