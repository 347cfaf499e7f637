"""QuantLinear: a drop-in for ``nn.Linear`` that holds packed integer weights and computes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from ptq4arvg_kernels import linear, quantize
from ptq4arvg_kernels.ops import Activation
from ptq4arvg_kernels.packing import column_sums, pack, packed_row_bytes, unpack
from ptq4arvg_kernels.plans import LayerPlan, PackedWeights
from ptq4arvg_kernels.registry import OpSpec, Served, serving
from ptq4arvg_kernels.tables import make_table

__all__ = ["QuantLinear"]

# codes, row sums, packed weight, weight bits, K, weight scales, column sums, bias, table, positions
Operands: TypeAlias = tuple[Tensor, Tensor, Tensor, int, int, Tensor, Tensor, Tensor | None, Tensor, Tensor]


class QuantLinear(nn.Module):
    """Integer linear layer with a static input scale per sequence position.

    ``forward(x, positions)`` quantizes x with the parameters of its positions, multiplies in integers and returns x's
    dtype. Positions are an argument (or None where all positions share one group); nothing is changed by a call.

    State: ``qweight`` uint8 (packed, see ``ptq4arvg_kernels.packing``), ``w_scale`` float32 ``[N]``, ``bias`` float32
    ``[N]`` or None, and the groups of positions: ``delta`` float32, ``zero_point`` int16, ``act_bits`` uint8 ``[G]``,
    ``group_of_position`` int16 ``[T]``. The table ``[T, 4]`` and the column sums ``[N]`` that the operators read are
    derived from these (:meth:`refresh`) and not saved.

    Args:
        in_features, out_features: K and N, of any size.
        w_bits: 8 or 6.
        groups, length: G and T.
        bias: whether there is one.
        activation: applied to x before quantization: ``"none"`` or ``"silu"``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        w_bits: int,
        groups: int,
        length: int,
        bias: bool = True,
        activation: str = "none",
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ValueError(f"activation is {activation!r}; known: {', '.join(get_args(Activation))}")
        self.in_features, self.out_features, self.w_bits = in_features, out_features, w_bits
        self.activation = cast(Activation, activation)

        def buffer(name: str, value: Tensor | None, persistent: bool = True) -> None:
            self.register_buffer(name, value, persistent)

        buffer("qweight", torch.zeros(out_features, packed_row_bytes(in_features, w_bits), dtype=torch.uint8))
        buffer("w_scale", torch.ones(out_features))
        buffer("bias", torch.zeros(out_features) if bias else None)
        buffer("delta", torch.ones(groups))
        buffer("zero_point", torch.zeros(groups, dtype=torch.int16))
        buffer("act_bits", torch.full((groups,), 8, dtype=torch.uint8))
        buffer("group_of_position", torch.zeros(length, dtype=torch.int16))
        buffer("table", torch.zeros(length, 4), persistent=False)
        buffer("col_sums", torch.zeros(out_features, dtype=torch.int32), persistent=False)
        self.qweight: Tensor
        self.w_scale: Tensor
        self.bias: Tensor | None
        self.delta: Tensor
        self.zero_point: Tensor
        self.act_bits: Tensor
        self.group_of_position: Tensor
        self.table: Tensor
        self.col_sums: Tensor
        self._served = Served("layer", self.call_spec)
        self.packed: PackedWeights | None = None
        self.plan: LayerPlan | None = None

    # --- weights in a backend's own order -----------------------------------------------------------------------------

    def prepare(self, paired: bool = False) -> bool:
        """Keep the weights in the order of the backend that serves this device, if it has one; says whether it does.

        From then on the buffer ``qweight`` is gone, and reading the attribute makes the stored form again, a copy.
        Saving, moving to a device and loading a state dict see to it by themselves. Results do not change.

        Args:
            paired: the rows are ``[w1; w3]`` of a SwiGLU block.
        """
        if self.packed is not None and self.packed.paired == paired:
            return True
        self.restore()
        backend = serving("weights", self.call_spec(torch.float32))
        if backend is None:
            return False
        self.packed = backend.implementations["weights"](
            self.qweight, self.w_bits, self.in_features, self.w_scale, self.col_sums, self.bias, self.table, paired
        )
        self.plan = None if paired else backend.implementations["layer"](self.packed, self.activation)
        del self.qweight
        return True

    def restore(self) -> None:
        """Undo :meth:`prepare`: ``qweight`` as stored, bit for bit."""
        packed = self.packed
        if packed is not None:
            self.packed = self.plan = None
            self.register_buffer("qweight", packed.qweight())

    def __getattr__(self, name: str) -> Any:
        packed: PackedWeights | None = self.__dict__.get("packed")
        if name == "qweight" and packed is not None:
            if torch.compiler.is_exporting():
                raise RuntimeError(
                    "this model is prepared for the backend of its device, whose weights cannot be exported; call "
                    "ptq4arvg.blocks.restore(model) before torch.export"
                )
            return packed.qweight()
        return super().__getattr__(name)

    def planned(self, dtype: torch.dtype) -> bool:
        """Whether what :meth:`prepare` made serves the next call: same operands, same backend."""
        packed, own = self.packed, self._buffers
        if packed is None or torch.compiler.is_compiling():
            return False
        same = packed.w_scale is own["w_scale"] and packed.bias is own["bias"] and packed.table is own["table"]
        return same and packed.col_sums is own["col_sums"] and self._served(dtype) is not None

    def call_spec(self, dtype: torch.dtype) -> OpSpec:
        """What a backend is asked whether it serves."""
        sizes = (self.in_features, self.out_features, self.w_bits)
        return OpSpec(self.w_scale.device, dtype, 1, *sizes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        self.restore()
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[f"{prefix}qweight"] = self.qweight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold the weights as stored: a plan holds addresses.
        state = self.__dict__.copy()
        del state["_served"]  # it refers to this very layer
        if self.packed is not None:
            state["_buffers"] = self._buffers | {"qweight": self.qweight}
            state["packed"] = state["plan"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._served = Served("layer", self.call_spec)

    # --- construction -------------------------------------------------------------------------------------------------

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        w_bits: int,
        delta: Tensor,
        zero_point: Tensor,
        act_bits: Tensor,
        group_of_position: Tensor,
        activation: str = "none",
    ) -> QuantLinear:
        """Pack weight codes int8 ``[N, K]`` with their scales ``[N]`` and attach the input's static parameters.

        Raises:
            ValueError: codes outside the symmetric grid, a step that is not positive, a zero point that is not an
                integer of its grid, sizes that disagree.
            IndexError: a position in a group that does not exist.
        """
        if codes.ndim != 2:
            raise ValueError(f"codes have shape {tuple(codes.shape)}, expected [N, K]")
        out_features, in_features = codes.shape
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out_features},)")
        # Checked as given: the storage types below would round a fractional zero point and wrap a large one.
        table = make_table(delta.float(), zero_point, act_bits, group_of_position)
        layer = cls(in_features, out_features, w_bits, len(delta), len(table), bias is not None, activation)
        layer.qweight = pack(codes, w_bits)
        layer.w_scale = w_scale.detach().float().clone()
        layer.bias = None if bias is None else bias.detach().float().clone()
        layer.delta = delta.detach().float().clone()
        layer.zero_point = zero_point.to(torch.int16)
        layer.act_bits = act_bits.to(torch.uint8)
        layer.group_of_position = group_of_position.to(torch.int16)
        return layer.refresh()

    def refresh(self) -> QuantLinear:
        """Derive the position table and the column sums from the saved state, checking all of it. Returns self.

        Raises:
            ValueError: corrupt codes or parameters outside the law.
        """
        scale_ok = torch.isfinite(self.w_scale) & (self.w_scale > 0)
        if self.w_scale.shape != (self.out_features,) or not bool(scale_ok.all()):
            wrong = (
                f"{float(self.w_scale[~scale_ok][0])}" if not bool(scale_ok.all()) else f"{len(self.w_scale)} numbers"
            )
            raise ValueError(f"w_scale holds {wrong}; expected {self.out_features} finite positive numbers")
        if self.bias is not None and not bool(torch.isfinite(self.bias).all()):
            raise ValueError(f"bias holds {float(self.bias[~torch.isfinite(self.bias)][0])}; it must be finite")
        self.restore()
        self.table = make_table(self.delta, self.zero_point, self.act_bits, self.group_of_position.long())
        self.col_sums = column_sums(unpack(self.qweight, self.w_bits, self.in_features))
        return self

    def operands(self, codes: Tensor, row_sums: Tensor, positions: Tensor) -> Operands:
        """Arguments that every linear operator of ``ptq4arvg_kernels`` takes first."""
        return (
            codes,
            row_sums,
            self.qweight,
            self.w_bits,
            self.in_features,
            self.w_scale,
            self.col_sums,
            self.bias,
            self.table,
            positions,
        )

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """``x`` float ``[…, K]``, ``positions`` int64 ``[P]`` (batch-major rows, P divides them); returns ``[…, N]``.

        Raises:
            ValueError: no positions although positions differ in scale, or a last axis that is not K.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"input has {x.shape[-1]} features, this layer takes {self.in_features}")
        if positions is None:
            if len(self.delta) != 1:
                raise ValueError(
                    f"this layer has {len(self.delta)} groups of positions; "
                    "pass positions (int64 [P]) so that it can choose the scale"
                )
            positions = torch.zeros(1, dtype=torch.int64, device=x.device)
        rows = x.reshape(-1, self.in_features)
        if self.plan is not None and self.planned(x.dtype):
            planned = self.plan(rows.contiguous(), positions.contiguous())
            if planned is not None:
                return planned.view(*x.shape[:-1], self.out_features)
        # One operator at a time; after a plan that refused its input, these say what is wrong.
        codes, row_sums = quantize(rows, self.table, positions, self.activation)
        y = linear(*self.operands(codes, row_sums, positions), "none", x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def dequantized_weight(self) -> Tensor:
        """``s_j · w_jk``, float32 ``[N, K]``."""
        return unpack(self.qweight, self.w_bits, self.in_features).float() * self.w_scale[:, None]

    def extra_repr(self) -> str:
        act = "/".join(str(bits) for bits in sorted(set(self.act_bits.tolist())))
        return f"{self.in_features} → {self.out_features}, W{self.w_bits}A{act}, {len(self.delta)} groups"
