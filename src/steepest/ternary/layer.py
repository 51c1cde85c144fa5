"""Linear layers whose weights are −1, 0 or 1, or just −1 or 1, times a learned scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from typing_extensions import Self

from steepest.distributed.local import assign, is_dtensor
from steepest.engine.cuda_graphs import capturing
from steepest.ternary.checksum import checksum
from steepest.ternary.chunks import all_finite, row_blocks
from steepest.ternary.linear_op import scale_dims, spread, summed, ternary_linear
from steepest.ternary.packing import (
    Bits,
    check_packed,
    check_values,
    from_base3,
    pack,
    packed_width,
    to_base3,
    unpack,
)
from steepest.ternary.vote_buffer import NOBODY

__all__ = ["BinaryLinear", "Scale", "TernaryLinear"]

Scale = Literal["row", "tensor", "group"]


class TernaryLinear(nn.Module):
    r"""A linear layer of ternary weights, stored in 2 bits each, without a float copy.

    .. math:: y = x\,(s \circ T)^\top + b, \qquad T \in \{-1, 0, 1\}^{\text{out} \times \text{in}}

    The scales s and the bias b are ordinary parameters, trained by any optimizer. T is moved by votes if a
    :class:`TernaryFlip` was made for the model, or an optimizer by :func:`steepest.build`; otherwise it is
    constant. The gradients of x, s and b are exact. The gradient of T, (dyᵀx)∘s, is turned into votes in
    backward, a block of rows at a time, and never kept; in training mode only. Every backward pass votes,
    those of ``torch.autograd.grad`` and of a layer used twice too; activation checkpointing adds none.

    Bytes: ``packed`` takes ⌈in/4⌉ a row; the scales 4 each. Votes: see :class:`TernaryFlip`.

    Args:
        in_features, out_features: sizes of inputs and outputs, at least 1.
        bias: whether there is a bias.
        scale: one scale per output (``"row"``, shape [out]), a single one (``"tensor"``, shape [1]), or one
            per ``group_size`` consecutive weights of a row (``"group"``, shape [out, ⌈in/group_size⌉]).
        group_size: used with ``scale="group"``. The last group of a row may be smaller.
        device, dtype: of the layer; ``dtype`` is that of scales and bias.

    The initial weights are drawn as ``nn.Linear`` draws its own, then T = round(w/mean|w|), clamped, the
    mean over the weights that share a scale, and s such that s²·ΣT² = Σw² there: the outputs keep their
    variance.

    Attributes:
        bits: of a packed weight: 2; 1 in :class:`BinaryLinear`.
        votes: a parameter of one element, always 0, that stands for T among the parameters: its
            ``requires_grad`` is T's, its state in an optimizer belongs to T, and its gradient is 0, or NaN
            where an element of dT was infinite or NaN (unless ``nonfinite`` is ``"ignore"``).
        packed: T, uint8 [out, ⌈in/4⌉], a buffer in the state dict; :func:`steepest.ternary.unpack` has
            the layout. The state dict also has the sizes, int64, which the bytes alone do not tell.
        checksum: None; of a :class:`BinaryLinear` the checksum of ``packed``, see there.

    Raises:
        ValueError: a size below 1, or another ``scale``.
        RuntimeError: from ``load_state_dict``, for the weights of a layer of another kind or size, and for
            bytes that are no valid codes; the layer stays as it was. From ``state_dict``, if something, such
            as an average of buffers, has made T invalid; ``named_buffers`` still has the bytes.

    Source: Ma et al. 2024 (BitNet b1.58) for rounding by the mean magnitude, there of latent floats.

    >>> layer = TernaryLinear(5, 3)
    >>> layer.packed.shape, layer.scale.shape, sorted(set(layer.unpack().flatten().tolist()) - {-1, 0, 1})
    (torch.Size([3, 2]), torch.Size([3]), [])
    >>> x = torch.randn(2, 5)
    >>> torch.allclose(layer(x), torch.nn.functional.linear(x, layer.dense(), layer.bias), atol=1e-6)
    True
    """

    bits: ClassVar[Bits] = 2
    packed: Tensor
    checksum: Tensor | None
    # The handle of the buffer into which backward votes. It belongs to the trainer, so it is not moved,
    # copied or saved with the layer.
    vote_buffer: Tensor | None = None
    # Which T, by the tensor and its version, was last seen to hold valid codes.
    _valid: tuple[int, int] | None = None
    # Marks the layers for steepest.build, and makes their param group there; set in trainer.py.
    _steepest_targets: ClassVar[Any]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scale: Scale = "row",
        group_size: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features, "group_size": group_size}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be an integer ≥ 1, got {size!r}")
        self.in_features, self.out_features = in_features, out_features
        self.group_size = min(group_size, in_features)
        shapes: dict[str, tuple[int, ...]] = {
            "row": (out_features,),
            "tensor": (1,),
            "group": (out_features, -(-in_features // self.group_size)),
        }
        if scale not in shapes:
            raise ValueError(
                f"{type(self).__name__}: scale must be 'row', 'tensor' or 'group', got {scale!r}"
            )
        width = packed_width(in_features, self.bits)
        self.register_buffer("packed", torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        # Any byte is valid as binary weights, so an average of bytes would not show. As bytes, the checksum
        # survives an average of equal ones where T does.
        words = torch.zeros(8, dtype=torch.uint8, device=device) if self.bits == 1 else None
        self.register_buffer("checksum", words)
        self.scale = nn.Parameter(torch.empty(shapes[scale], device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.votes = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, scale: Scale = "row", group_size: int = 128) -> Self:
        """Round a float layer's weights as the constructor does; the bias is copied.

        Where the weight is frozen (``requires_grad`` is False), the scales and T are too.

        Raises:
            ValueError: the weight has infinite or NaN elements, or is sharded.

        >>> layer = TernaryLinear.from_linear(nn.Linear(8, 4, bias=False))
        >>> layer.in_features, layer.out_features, layer.bias
        (8, 4, None)
        """
        weight = linear.weight
        if is_dtensor(weight):
            raise ValueError(
                f"{cls.__name__}.from_linear: the weight is a DTensor: make ternary layers before "
                "fully_shard and parallelize_module"
            )
        if not all_finite(weight):
            raise ValueError(f"{cls.__name__}.from_linear: the weight has infinite or NaN elements")
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        given = {"scale": scale, "group_size": group_size, "device": weight.device, "dtype": weight.dtype}
        made: Self = skip_init(cls, *sizes, **given)  # type: ignore[no-untyped-call]
        made._round(weight)
        made.votes.zero_().requires_grad_(weight.requires_grad)
        made.scale.requires_grad_(weight.requires_grad)
        if linear.bias is not None:
            made.bias.copy_(linear.bias)
            made.bias.requires_grad_(linear.bias.requires_grad)
        return made.train(linear.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights and bias again, from torch's global generator, as the constructor did.

        Where scales and bias are sharded, all processes draw everything: their generators must be equal.
        """
        sizes, like = (self.in_features, self.out_features, self.bias is not None), self.scale
        linear = nn.Linear(*sizes, device=self.packed.device, dtype=like.dtype)
        self._round(linear.weight)
        self.votes.zero_()
        if self.bias is not None:
            assign(self.bias, linear.bias)

    def _round(self, weight: Tensor) -> None:
        """Set T and s from float weights, in place, so that an optimizer's references stay valid."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = torch.empty(self.scale.shape, dtype=wide, device=self.packed.device)
        # A single scale needs sums over all rows, so all rows are taken at once.
        blocks = row_blocks(self.out_features, self.in_features, weight.device)
        dims = scale_dims(scale)
        for rows in blocks if dims > 0 else [slice(0, self.out_features)]:
            block = weight[rows].to(wide)
            values = self._rounded(block)
            energy, kept = (summed(each.square(), dims, self.group_size) for each in (block, values))
            # Where all of T is 0, the scale is that of a fresh layer: with a scale of 0, T would never move.
            fresh = 1 / math.sqrt(2 * self.in_features)
            found = torch.where(kept > 0, (energy / kept.clamp(min=1)).sqrt(), fresh)
            scale[rows if dims > 0 else ...] = found
            self.packed[rows] = pack(values.to(torch.int8), bits=self.bits)
        self.seal()
        assign(self.scale, scale)

    def _rounded(self, block: Tensor) -> Tensor:
        """Round some rows to T, as floats."""
        dims, group_size = scale_dims(self.scale), self.group_size
        mean = summed(block.abs(), dims, group_size) / summed(torch.ones_like(block), dims, group_size)
        mean = torch.where(mean > 0, mean, 1.0)
        return (block / spread(mean, slice(None), self.in_features, group_size)).round().clamp(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in x's dtype; under autocast in autocast's, except for float64.

        Raises:
            ValueError: inputs of another dtype or another last dimension.
            RuntimeError: something, such as an average of buffers, has made T invalid.
        """
        if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}({self.in_features}, {self.out_features}) takes floating-point inputs "
                f"of shape [..., {self.in_features}], got inputs of shape {tuple(x.shape)}, {x.dtype}"
            )
        # Autocast leaves float64 alone, as in torch's own layers.
        if not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # The parameter is always used, or DistributedDataParallel would wait for its gradient.
        votes, vote_buffer, packed = self.votes, self.vote_buffer, self.packed
        trains = self.training and votes.requires_grad
        if not trains or vote_buffer is None:  # else a trainer moves T in every step
            self._refuse_averaged(packed)
            vote_buffer = NOBODY if trains else None
        y: Tensor = ternary_linear(
            x, packed, self.scale, self.in_features, self.group_size, vote_buffer, self.bits, votes
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _refuse_averaged(self, packed: Tensor) -> None:
        """Raise ``RuntimeError`` if T has been written to and is no valid T, see :meth:`verify_packed`.

        It is looked at only when it has changed, by its version, since it was last looked at.
        """
        if torch.compiler.is_compiling() or type(packed) is not Tensor or packed.is_inference():
            return
        seen = id(packed), packed._version
        if seen == self._valid or packed.is_meta or capturing():
            return
        try:
            self.verify_packed(packed, self.checksum)
        except ValueError as error:
            raise RuntimeError(
                f"{type(self).__name__}({self.in_features}, {self.out_features}): {error}. Something has "
                "done arithmetic on the bytes of packed weights, as averages of buffers do: use "
                "AveragedModel(use_buffers=False), which copies them (in Lightning "
                "EMAWeightAveraging(use_buffers=False), in timm ModelEmaV3(exclude_buffers=True)), and load "
                "or copy the weights again"
            ) from None
        self._valid = seen

    def verify_packed(self, packed: Tensor, sealed: Tensor | None) -> None:
        """Raise ``ValueError`` unless ``packed`` holds valid codes, with the checksum if there is one."""
        check_packed("packed", packed, self.in_features, self.bits)
        if sealed is not None and not torch.equal(sealed, _bytes(checksum(packed)).to(sealed.device)):
            raise ValueError("packed does not match its checksum")

    @torch.no_grad()
    def seal(self) -> None:
        """Write the checksum of binary weights, after ``packed`` was written to from outside.

        >>> layer = BinaryLinear(16, 2).eval()
        >>> _ = layer.packed.fill_(0)  # the code of 1
        >>> layer.seal()
        >>> int(layer.unpack().sum())
        32
        """
        if self.checksum is not None:
            self.checksum.copy_(_bytes(checksum(self.packed)))

    def unpack(self) -> Tensor:
        """Return T, int8 [out, in].

        Raises:
            RuntimeError: something, such as an average of buffers, has made T invalid.
        """
        self._refuse_averaged(self.packed)
        return unpack(self.packed, self.in_features, bits=self.bits)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return s∘T in the scales' dtype, [out, in]: a copy, to look at or to export."""
        self._refuse_averaged(self.packed)
        values = unpack(self.packed, self.in_features, self.scale.dtype, bits=self.bits)
        return values * spread(self.scale, slice(None), self.in_features, self.group_size)

    @torch.no_grad()
    def set_ternary(self, values: Tensor) -> None:
        """Set T from numbers −1, 0, 1 (−1, 1 in :class:`BinaryLinear`) of shape [out, in] and any dtype.

        Raises:
            ValueError: another shape or another number; nothing was changed.
        """
        shape = (self.out_features, self.in_features)
        if values.shape != shape:
            raise ValueError(f"T has shape {shape}, got {tuple(values.shape)}")
        check_values("T", values, self.bits)
        self.packed.copy_(pack(values.to(self.packed.device, torch.int8), bits=self.bits))
        self.seal()

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """Make a float layer with the same outputs; it shares nothing with this one.

        >>> layer = TernaryLinear(4, 2, scale="tensor")
        >>> torch.equal(TernaryLinear.from_linear(layer.to_linear(), scale="tensor").unpack(), layer.unpack())
        True
        """
        sizes, like = (self.in_features, self.out_features, self.bias is not None), self.scale
        given = {"device": like.device, "dtype": like.dtype}
        made: nn.Linear = skip_init(nn.Linear, *sizes, **given)  # type: ignore[no-untyped-call]
        made.weight.copy_(self.dense())
        made.weight.requires_grad_(self.votes.requires_grad or like.requires_grad)
        if self.bias is not None:
            made.bias.copy_(self.bias)
            made.bias.requires_grad_(self.bias.requires_grad)
        return made.train(self.training)

    def to_base3(self) -> Tensor:
        """Store T in base 3, five a byte: uint8 [⌈out·in/5⌉]; :meth:`load_base3` reads it.

        >>> layer, other = TernaryLinear(7, 3), TernaryLinear(7, 3)
        >>> other.load_base3(layer.to_base3())
        >>> torch.equal(other.packed, layer.packed), layer.to_base3().shape
        (True, torch.Size([5]))
        """
        return to_base3(self.unpack())

    def load_base3(self, code: Tensor) -> None:
        """Set T from what :meth:`to_base3` returned; ``ValueError`` if it is of another size."""
        self.set_ternary(from_base3(code, (self.out_features, self.in_features)))

    def get_extra_state(self) -> Tensor:
        """Return [in, out, group size, bits], int64, for the state dict; without groups the third is 0."""
        # A tensor, like all that code expects to clone, send or store in a state dict.
        group_size = self.group_size if self.scale.dim() == 2 else 0
        return torch.tensor([self.in_features, self.out_features, group_size, self.bits], device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: the sizes were compared before anything was loaded."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Memory that to_empty() has made, and a distributed checkpoint is about to fill, holds no T yet.
        if not self.packed.is_inference() and self.packed._version > 0:
            self._refuse_averaged(self.packed)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **more: Any
    ) -> None:
        # Saved before there was such a parameter.
        saved = state_dict.get(f"{prefix}packed", self.packed)
        state_dict.setdefault(f"{prefix}votes", self.votes.new_zeros(1, device=saved.device))
        # Saved before there were checksums.
        if self.checksum is not None and saved.dtype == torch.uint8 and f"{prefix}packed" in state_dict:
            state_dict.setdefault(f"{prefix}checksum", _bytes(checksum(saved)))
        # Saved when a single scale was 0-dim, which fully_shard refuses.
        scale = state_dict.get(f"{prefix}scale")
        if isinstance(scale, Tensor) and scale.dim() == 0:
            state_dict[f"{prefix}scale"] = scale.view(1)
        wrong = self._misfit(state_dict, prefix)
        if wrong is None:
            super()._load_from_state_dict(state_dict, prefix, *arguments, **more)
            return
        # torch's last argument collects the errors of all layers; torch raises them together.
        errors = more["error_msgs"] if "error_msgs" in more else arguments[-1]
        errors.append(f"ternary layer {prefix.removesuffix('.')!r}: {wrong}")

    def _misfit(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Say why a state dict is not this layer's, as far as torch does not find it by itself."""
        sizes, packed = state_dict.get(f"{prefix}_extra_state"), state_dict.get(f"{prefix}packed")
        if sizes is not None:
            saved, own = torch.as_tensor(sizes).tolist(), self.get_extra_state().tolist()
            # Saved before there were binary layers.
            saved = [*saved, 2] if len(saved) == 3 else saved
            if saved != own:
                return f"saved with [in, out, group size, bits] = {saved}, but this layer has {own}"
        if isinstance(packed, Tensor) and packed.shape == self.packed.shape and not packed.is_meta:
            try:
                self.verify_packed(packed, state_dict.get(f"{prefix}checksum"))
            except ValueError as error:
                return str(error)
        return None

    def extra_repr(self) -> str:
        """Return the arguments that the layer's text shows."""
        kinds = {0: "'tensor'", 1: "'row'", 2: f"'group', group_size={self.group_size}"}
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scale={kinds[scale_dims(self.scale)]}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copy without the vote buffer: a copy votes once a trainer of its own attaches it."""
        return {**self.__dict__, "vote_buffer": None, "_valid": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "checksum" not in self._buffers:  # pickled before there were checksums
            self._buffers["checksum"] = _bytes(checksum(self.packed)) if self.bits == 1 else None


class BinaryLinear(TernaryLinear):
    r"""A linear layer of binary weights, stored in one bit each, without a float copy.

    .. math:: y = x\,(s \circ T)^\top + b, \qquad T \in \{-1, 1\}^{\text{out} \times \text{in}}

    It is a :class:`TernaryLinear` in everything else, and the same :class:`TernaryFlip` trains it: where
    enough votes point to the other sign, T changes its sign. There is no 0 in between, so a flip moves a
    weight by two scales instead of one.

    Bytes: ``packed`` takes ⌈in/8⌉ a row; the scales 4 each. Votes: see :class:`TernaryFlip`. (Base 3 takes
    more than ``packed`` here.)

    ``checksum``, uint8 [8], is a buffer, too: that of ``packed`` when T last changed. Averages of buffers
    do not keep it, and so a layer tells that its weights were averaged. Code that writes to ``packed``
    itself calls :meth:`seal` afterwards. State dicts without it load.

    The arguments are those of :class:`TernaryLinear`. The initial weights are drawn as ``nn.Linear`` draws
    its own, then T = sign(w), 1 for 0, and s is the root mean square of the weights that share it: the
    outputs keep their variance.

    Source: Rastegari et al. 2016 (XNOR-Net) for signs times a scale, there the mean magnitude, of latent
    floats.

    >>> layer = BinaryLinear(9, 3)
    >>> layer.packed.shape, sorted(set(layer.unpack().flatten().tolist()) - {-1, 1})
    (torch.Size([3, 2]), [])
    >>> x = torch.randn(2, 9)
    >>> torch.allclose(layer(x), torch.nn.functional.linear(x, layer.dense(), layer.bias), atol=1e-6)
    True
    """

    bits: ClassVar[Bits] = 1

    def _rounded(self, block: Tensor) -> Tensor:
        return torch.where(block < 0, -1.0, 1.0).to(block.dtype)


def _bytes(number: Tensor) -> Tensor:
    return number.view(1).view(torch.uint8)
