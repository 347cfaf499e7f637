"""Recipes: how many bits each layer gets and which parts of the method are used. Plain data, saved with the
checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ptq4arvg.protocol import ROLES

__all__ = ["RECIPES", "Recipe", "named_recipe"]

FOLDABLE = ("qkv", "fc1", "head")


def _all(bits: int) -> dict[str, int]:
    return dict.fromkeys(ROLES, bits)


@dataclass(frozen=True)
class Recipe:
    """What to do to a generator.

    Attributes:
        name: shown and saved.
        weight_bits, act_bits: 8 or 6 for every role in ``ptq4arvg.protocol.ROLES``.
        sink_bits: width of the codes at sink positions where a layer gives them groups of their own: 8-bit codes cost a
            tensor core nothing in a layer of 6-bit codes.
        scaled_roles: roles of the norm → Linear pairs that get the symmetric channel shift and GPS factors.
        compensate: whether weight rounding spreads its errors (GPTQ) or is round-to-nearest; modulation linears always
            round to nearest.
        dgc: whether calibration sequences are ranked (else the first ones, alternating branches, are used).
    """

    name: str
    weight_bits: dict[str, int] = field(default_factory=lambda: _all(8))
    act_bits: dict[str, int] = field(default_factory=lambda: _all(8))
    sink_bits: int = 8
    scaled_roles: tuple[str, ...] = FOLDABLE
    compensate: bool = True
    dgc: bool = True

    def __post_init__(self) -> None:
        for what in ("weight_bits", "act_bits"):
            table = getattr(self, what)
            if set(table) != set(ROLES):
                raise ValueError(
                    f"recipe {self.name!r}: {what} must name exactly the roles {', '.join(ROLES)}, "
                    f"got {', '.join(table)}"
                )
            for role, bits in table.items():
                if bits not in (6, 8):
                    raise ValueError(f"recipe {self.name!r}: {what}[{role!r}] is {bits}; supported are 6 and 8")
        if self.sink_bits not in (6, 8):
            raise ValueError(f"recipe {self.name!r}: sink_bits is {self.sink_bits}; supported are 6 and 8")
        unknown = set(self.scaled_roles) - set(FOLDABLE)
        if unknown:
            raise ValueError(
                f"recipe {self.name!r}: scaled_roles {sorted(unknown)} cannot be folded; "
                f"possible: {', '.join(FOLDABLE)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the inverse of :meth:`from_dict`, before and after a round trip."""
        return {**asdict(self), "scaled_roles": list(self.scaled_roles)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        return cls(**{**data, "scaled_roles": tuple(data["scaled_roles"])})


RECIPES: dict[str, Recipe] = {
    "w8a8": Recipe("w8a8"),
    "w6a8": Recipe("w6a8", weight_bits=_all(6)),
    "w6a6": Recipe("w6a6", weight_bits=_all(6), act_bits=_all(6)),
}


def named_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name (upper and lower case alike), or the recipe itself.

    Raises:
        ValueError: an unknown name; published and baseline recipes are named in the message's remedy.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe.lower() in RECIPES:
        return RECIPES[recipe.lower()]
    if recipe.lower() in ("paper", "rtn", "smoothquant"):
        raise ValueError(
            f"recipe {recipe!r} breaks the integer laws (asymmetric weights or per-tensor baselines) and cannot be "
            "packed; run it with ptq4arvg.simulate.simulate"
        )
    raise ValueError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
