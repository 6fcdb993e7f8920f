"""Parity: the limits within which cached log-probs count as this model's own (``train`` and ``verify``).

At step 0 the policy is the reference, so its own log-probs of a sample must equal the cached ones up to
rounding. Two forwards are compared with the cache: training's, with many pairs together, and a forward of
each sequence alone. The difference of the two is called the floor, and it has limits too. If the floor is
large, the model's log-probs depend on the rest of the batch, and no cache can be right.

No limit grows with the measured noise: a wrong mask makes noise too, and would excuse itself. Token log-probs
are compared, because margins would hide an error that chosen and rejected share.
"""

from typing import NamedTuple

import numpy as np

from dpo_opt.schemas.errors import FingerprintError, quoted
from dpo_opt.schemas.locations import location
from dpo_opt.schemas.manifest import score_again


class Limits(NamedTuple):
    """Limits of the differences, in nats per token."""

    mean: float
    """Three standard errors are added to it, because a mean over few tokens is off by chance."""
    sd: float
    p99: float
    max: float
    loss: float | None
    """Limit of the loss's distance from ln 2; None if the other limits are tighter."""


# bf16 engines differ by 0.03 to 0.05 (sd) on the same weights, single tokens by up to 0.7; another model or a
# shifted token by more than 0.5 on average, and by many nats at its worst token.
_HALF = Limits(mean=0.01, sd=0.1, p99=0.3, max=3.0, loss=None)
# With fp32 on both sides only the order of additions differs: at most 5e-5 was measured on a CPU, and an sd
# of up to 2.2e-3 was reported between engines on GPUs.
_FP32 = Limits(mean=1e-3, sd=2.5e-3, p99=5e-3, max=5e-3, loss=1e-3)
# Limits of the floor, which compares one engine with itself: 1e-6 was measured in fp32 on a CPU.
_FP32_FLOOR = Limits(mean=1e-4, sd=1e-4, p99=1e-3, max=5e-3, loss=None)

_USUAL_CAUSES = {
    "mean": "every token is shifted: other weights, another dtype, or a temperature",
    "sd": "noise beyond rounding: a lower precision or a quantization that the fingerprint does not record, "
    "or other weights",
    "p99": "one token in a hundred is far off: some rows were scored next to other tokens (cut, padded or "
    "packed wrongly)",
    "max": "a single token is far off: one damaged or wrongly scored row",
    "loss": "margins differ although single tokens hardly do: small differences add up in one direction",
}
_ALONE_CAUSE = "also with each sequence alone: the cache is from another model, or was scored wrongly"
_FLOOR_CAUSE = "this model's log-probs depend on the rest of the batch, or a kernel mixes sequences"
_EXPERTS_CAUSE = "; or rounding picks another expert where two are almost equally good, as in half precision"


class Check(NamedTuple):
    """One measured value and its limit."""

    name: str
    value: float
    limit: float
    ok: bool
    usual_cause: str
    """The usual cause if this check fails."""


class Parity(NamedTuple):
    """Cached minus own token log-probs, in nats per token, and the floor."""

    pairs: int
    tokens: int
    mean: float
    sd: float
    p99: float
    """99th percentile of the absolute difference."""
    max: float
    correlation: float | None
    """Of cached and own values. Not judged: it follows from ``sd`` and the spread of the values, and is low
    for completions that the model is sure of. None where all values are equal."""
    margin_mean: float
    """Of cached minus own (chosen minus rejected), summed over tokens: nats per pair."""
    margin_sd: float
    """The same: times beta it is the noise that the cache adds to the loss's logit."""
    loss: float
    """Mean loss of the sample at step 0 (``sigmoid``, beta 0.1); ln 2 when policy == reference."""
    worst_row: int
    """Source row of the token that differs most."""
    worst_side: str
    worst_token: int
    """Its position in the completion, from 0."""
    worst_cached: float
    worst_own: float
    dtype: str
    """Compute dtype of the own values."""
    cached_dtype: str
    ok: bool
    floor_sd: float
    floor_p99: float
    floor_max: float
    floor_margin_sd: float
    floor_mean: float = 0.0
    """Each sequence alone minus all together; so are the others of its kind."""
    alone_tokens: int = 0
    """Tokens of the sequences that were also scored alone; 0: all, in older records."""
    alone_mean: float = 0.0
    """Mean of the cached minus the own log-probs of each sequence alone; likewise the next three."""
    alone_sd: float = 0.0
    alone_p99: float = 0.0
    alone_max: float = 0.0
    experts: bool = False
    """Whether the model has experts, of which each token uses some."""

    @property
    def checks(self) -> list[Check]:
        """Every limit that applies, with its measured value."""
        fp32 = self.dtype == "float32"
        limits = _FP32 if fp32 and self.cached_dtype == "float32" else _HALF
        found = [
            *self._compared("", (self.mean, self.sd, self.p99, self.max), limits),
            *self._compared(
                "alone ", (self.alone_mean, self.alone_sd, self.alone_p99, self.alone_max), limits
            ),
            *self._compared(
                "floor ",
                (self.floor_mean, self.floor_sd, self.floor_p99, self.floor_max),
                _FP32_FLOOR if fp32 else _HALF,
            ),
        ]
        if limits.loss is not None:
            found.append(_check("loss", self.loss - float(np.log(2)), limits.loss, _USUAL_CAUSES["loss"]))
        return found

    def _compared(self, prefix: str, values: tuple[float, ...], limits: Limits) -> list[Check]:
        mean, sd, p99, largest = values
        tokens = (self.alone_tokens if prefix else 0) or self.tokens
        chance = 3 * min(limits.sd, sd) / tokens**0.5
        bounds = {
            "mean": (mean, limits.mean + chance),
            "sd": (sd, limits.sd),
            "p99": (p99, limits.p99),
            "max": (largest, limits.max),
        }
        found = []
        for name, (value, limit) in bounds.items():
            cause = {"": _USUAL_CAUSES[name], "alone ": _ALONE_CAUSE, "floor ": _FLOOR_CAUSE}[prefix]
            if self.experts and name != "mean":
                cause += _EXPERTS_CAUSE
            found.append(_check(prefix + name, value, limit, cause))
        return found


def _check(name: str, value: float, limit: float, cause: str) -> Check:
    size = abs(value)
    return Check(name, size, limit, bool(np.isfinite(size) and size <= limit), cause)


def require_parity(parity: Parity, *, shards: str, model: str) -> None:
    """Refuse to train if the cached log-probs are not this model's.

    Raises:
        FingerprintError: The parity is out of bounds; the message names each limit that failed.
    """
    if parity.ok:
        return
    failed = [check for check in parity.checks if not check.ok]
    reasons = "".join(f"\n    {c.name} {c.value:.4g} > {c.limit:.4g}: {c.usual_cause}" for c in failed)
    figures = (
        f"per token mean {parity.mean:+.4f}, sd {parity.sd:.4f}, p99 {parity.p99:.4f}, "
        f"max {parity.max:.4f} nats (floor sd {parity.floor_sd:.4f}) over {parity.tokens} tokens; "
        f"loss {parity.loss:.5f}, ln 2 is 0.69315{reasons}\n    {worst_token(parity)}"
    )
    if any(check.name.startswith("floor") for check in failed):
        raise FingerprintError(
            f"the log-probs of {quoted(model)} depend on the rest of the batch: {figures}",
            where=shards,
            why="no cache can hold them: every training step would see other numbers than were scored",
            fix="pass --dtype float32; if that fails too, report the versions with `dpo-opt env`",
        )
    again = score_again(location(shards), model=model, into="OTHER_FOLDER")
    if parity.experts and not (parity.dtype == parity.cached_dtype == "float32"):
        train = "dpo-opt train --dtype float32, where rounding picks no other expert"
        fix = f"{again} --dtype float32; then {train}"
    else:
        fix = f"{again}; or, if another reference is intended, dpo-opt train --reference-differs"
    raise FingerprintError(
        f"the cached log-probs are not those of {quoted(model)}: {figures}",
        where=shards,
        why="the policy would be pulled towards another model than the one it starts from",
        fix=fix,
    )


def worst_token(parity: Parity) -> str:
    """Where the largest difference is, in words."""
    return (
        f"largest difference: row {parity.worst_row}, {parity.worst_side}, token {parity.worst_token}: "
        f"cached {parity.worst_cached:.4f}, own {parity.worst_own:.4f}"
    )
