"""Tables of the GPU benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .tables import number, plain_table

PRINTED_WIDTH = 220
# Instructions of a main loop that have a column; the rest is added up.
KINDS: Mapping[str, tuple[str, ...]] = {
    "MMA": ("IMMA", "IGMMA", "UTCIMMA"),
    "LDSM": ("LDSM",),
    "LDS": ("LDS", "STS"),
    "LDGSTS": ("LDGSTS",),
    "LOP3": ("LOP3",),
    "PRMT": ("PRMT",),
    "SHF": ("SHF",),
    "IADD/IMAD": ("IADD", "IADD3", "IMAD", "VIADD", "LEA"),
}


def by_kind(counts: Mapping[str, float]) -> dict[str, float]:
    """Instructions of a loop by the columns of KINDS, and ``other``."""
    kinds = {kind: sum(counts.get(name, 0) for name in members) for kind, members in KINDS.items()}
    return kinds | {"other": sum(counts.values()) - sum(kinds.values())}


def _short(text: str, width: int = 30) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def resource_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Registers, spills and shared memory of the kernels of an architecture; main loops of GEMMs per K tile, and how
    many times their floor they are, where it is known."""
    right = ("regs", "spill B", "smem B", *KINDS, "other", "loop", "per 1000 MAC", "floor")
    table = plain_table(title, ("kernel", "tile", "variant"), right)
    for row in rows:
        loop = [""] * (len(KINDS) + 4)
        if "sass" in row:
            loop = [f"{count:g}" for count in by_kind(row["sass"]).values()]
            loop += [f"{row['sass_per_iteration']:g}", number(row["sass_per_kmac"]), number(row.get("over_floor"), 3)]
        resources = (str(row["registers"]), str(row["spill_bytes"]), str(row["shared_bytes"]))
        table.add_row(row["kernel"], row["tile"], _short(row["variant"]), *resources, *loop)
    return table


def traffic_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Bytes of every launch beside their minimum, and how well sectors and banks are used."""
    right = (
        "blocks",
        "run",
        "kB",
        "least kB",
        "ratio",
        "sectors/least",
        "efficiency",
        "wavefronts",
        "ideal",
        "in loops",
        "instr/kMAC",
    )
    table = plain_table(title, ("part", "kernel", "tile", "N x K"), right)
    for row in rows:
        size = f"{row['N']}x{row['K']}{'' if row['split'] == 1 else ' /' + str(row['split'])}" if "N" in row else ""
        table.add_row(
            row["part"],
            row["kernel"],
            row["tile"],
            size,
            str(row["blocks"]),
            str(row["emulated_blocks"]),
            number(row["bytes"] / 1e3, 1),
            number(row["minimum_bytes"] / 1e3, 1),
            number(row["ratio"], 3),
            number(row["sector_ratio"], 3),
            number(row["sector_efficiency"], 3),
            str(row["wavefronts"]),
            str(row["ideal_wavefronts"]),
            number(row["loop_bank_factor"], 3),
            number(row.get("instructions_per_kmac")),
        )
    return table
