"""MoClip (arXiv 2510.09152, section 3): the gradient may turn away from the momentum by `max_angle` at most.

Adam's moments and an arctangent step follow.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from megatron_replay.kernels.tensor_updates import Correction
from megatron_replay.optim.adam import MomentCoefficients
from megatron_replay.optim.adam_atan2 import Atan2Family
from megatron_replay.optim.adamw import adamw_correction, adamw_direction
from megatron_replay.optim.base import OPTIMIZERS, Common, Group
from megatron_replay.optim.option_checks import check_betas, check_choice, check_number
from megatron_replay.optim.shards import LOCAL, Placement, Shards
from megatron_replay.optim.stats import Scope, cosines, grouped

Obtuse = Literal["signed", "restart", "project"]
VSource = Literal["raw", "clipped"]


class Cap(NamedTuple):
    """The capped gradient g' = a g + b m of each group, [groups] each."""

    a: Tensor
    b: Tensor
    restart: Tensor
    """True: the group forgets its momentum in this step."""
    cosine: Tensor
    """Cosine of the angle between momentum and gradient; nan where one of them is zero."""


def coefficients(c: Tensor, mm: Tensor, gg: Tensor, *, max_angle: float, obtuse: Obtuse = "signed") -> Cap:
    """The cap of each group's gradient, from its sums c = sum m g, mm = sum m^2, gg = sum g^2, [groups] float64.

    `max_angle` is in degrees. x is the cosine of the angle between m and g. Nothing happens where x >= cos(max_angle),
    m or g is zero, or max_angle >= 90. Otherwise the part of g across m shrinks to tan(max_angle) times the part along
    it. (The paper's eq. 5 divides by |m| where |g_across| is meant.) That leaves an obtuse gradient 180 - max_angle or
    more away.

    `obtuse` says what happens to such a gradient. `signed` is the paper's rule, unchanged. `restart` drops the momentum
    instead. `project` takes the point nearest to g within max_angle of m, which may be zero.
    """
    one, zero = torch.ones_like(c), torch.zeros_like(c)
    known = (mm > 0) & (gg > 0)
    m_norm, g_norm = mm.where(known, one).sqrt(), gg.where(known, one).sqrt()
    cosine = cosines(c, mm, gg)
    x = cosine.where(known, one)
    if max_angle >= 90:  # the tangent would be infinite, or negative
        return Cap(one, zero, torch.zeros_like(known), cosine)
    limit = math.radians(max_angle)
    capped = known & (x < math.cos(limit))
    restart = capped & (x <= 0) & (obtuse == "restart")
    across = ((1 - x) * (1 + x)).sqrt()
    if obtuse == "project":
        reach = (x.acos() - limit).cos().clamp(min=0)
        a = (reach * math.sin(limit) / across).where(reach > 0, zero)
        b = g_norm / m_norm * reach * math.cos(limit) - a * (c / m_norm) / m_norm
    else:
        a = (math.tan(limit) * x.abs() / across).clamp(max=1)
        b = (1 - a) * (c / m_norm) / m_norm
    turned = capped & ~restart
    return Cap(a.where(turned, one), b.where(turned, zero), restart, cosine)


@OPTIMIZERS.register("moclip")
class MoClip(Atan2Family):
    """MoClip; `max_angle` is in degrees, and 90 or more is Adam-atan2 bit for bit.

    - scope: the extent over which a gradient is compared with its momentum: the whole model, a layer (as `shards`
      numbers them), or each tensor.
    - obtuse: see `coefficients`.
    - v_source: the second moment is of the raw gradient, or of the capped one.
    - eps: when given, the direction is AdamW's with this epsilon, not the arctangent (the paper's ablation).
    """

    reads_momentum = True
    prefix = "moclip"

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        max_angle: float = 45.0,
        scope: Scope = "global",
        obtuse: Obtuse = "signed",
        v_source: VSource = "raw",
        eps: float | None = None,
        shards: Shards = LOCAL,
        **common: Unpack[Common],
    ) -> None:
        check_number("max_angle", max_angle, above=0)
        check_choice("scope", scope, get_args(Scope))
        check_choice("obtuse", obtuse, get_args(Obtuse))
        check_choice("v_source", v_source, get_args(VSource))
        if eps is not None:
            check_number("eps", eps, at_least=0)
        defaults = {"lr": lr, "betas": check_betas(betas), "weight_decay": weight_decay}
        super().__init__(params, defaults, shards, common)
        self.max_angle, self.scope, self.obtuse, self.v_source = max_angle, scope, obtuse, v_source
        self.eps = eps  # not in the groups, where AdamW's checkpoints have theirs
        self._rows: list[tuple[float, float, bool]] = []

    def plan(self, sums: Tensor, place: Placement, scale: float) -> None:
        super().plan(sums, place, scale)
        groups, label = grouped(sums[:, :3], place.layers, scope=self.scope)
        cap = coefficients(*groups.unbind(1), max_angle=self.max_angle, obtuse=self.obtuse)
        a, b, restart = (column[label].tolist() for column in cap[:3])
        self._rows = list(zip(a, b, restart, strict=True))
        self.metrics |= cap_metrics(groups, cap)

    def moment_coefficients(self, row: int, betas: tuple[float, float]) -> MomentCoefficients:
        beta1, beta2 = betas
        a, b, restart = self._rows[row]
        a, b = a * self._scale, b * self._scale
        keep = 0.0 if restart else beta1 + (1 - beta1) * b
        root, clipped = math.sqrt(1 - beta2), self.v_source == "clipped"
        return MomentCoefficients(
            m_keep=keep,
            m_grad=(1 - beta1) * a,
            v_grad=root * (a if clipped else self._scale),
            v_momentum=root * b if clipped else 0.0,
        )

    def direction(self, exp_avg: Tensor, exp_avg_sq: Tensor, scratch: tuple[Tensor, Tensor], group: Group) -> Tensor:
        if self.eps is None:
            return super().direction(exp_avg, exp_avg_sq, scratch, group)
        return adamw_direction(
            exp_avg, exp_avg_sq, scratch, step=group["step"], betas=self.setting(group, "betas"), eps=self.eps
        )

    def correction(self, group: Group) -> Correction | None:
        if self.eps is None:
            return super().correction(group)
        return adamw_correction(group["step"], self.setting(group, "betas"), self.eps)


def cap_metrics(groups: Tensor, cap: Cap) -> dict[str, float]:
    """Metrics of the cap in this step, from the groups' sums [groups, 3].

    Groups without momentum or gradient count for `grad_ratio` only.
    """
    c, mm, gg = groups.unbind(1)
    known = ~cap.cosine.isnan()
    before = float(gg.sum())
    after = float((cap.a**2 * gg + 2 * cap.a * cap.b * c + cap.b**2 * mm).clamp(min=0).sum())
    metrics = {"moclip/grad_ratio": math.sqrt(after / before) if before else 1.0}
    if known.any():
        angle = cap.cosine[known].acos().rad2deg()
        capped = (cap.a != 1) | (cap.b != 0) | cap.restart
        metrics |= {
            "moclip/angle_mean": float(angle.mean()),
            "moclip/angle_p95": float(angle.quantile(0.95)),
            "moclip/clipped": float(capped[known].double().mean()),
            "moclip/obtuse": float((cap.cosine[known] < 0).double().mean()),
        }
    return metrics
