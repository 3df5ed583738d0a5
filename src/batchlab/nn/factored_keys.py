"""State-dict keys under which others keep what a factored layer calls v, g, left and right."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from batchlab.functional.factored import factor_weight

__all__ = ["with_own_keys"]

FOREIGN_KEYS: Final[dict[str, tuple[dict[str, str], ...]]] = {
    "weight_norm": (
        {"parametrizations.weight.original0": "g", "parametrizations.weight.original1": "v"},
        {"weight_g": "g", "weight_v": "v"},
    ),
    "spectral_norm": (
        {
            "parametrizations.weight.original": "v",
            "parametrizations.weight.0._u": "left",
            "parametrizations.weight.0._v": "right",
        },
        {"weight_orig": "v", "weight_u": "left", "weight_v": "right"},
    ),
}
"""Keys of torch.nn.utils.parametrizations, then those of the older torch.nn.utils.weight_norm and spectral_norm."""


def with_own_keys(state_dict: dict[str, Any], prefix: str, factorization: str, eps: float, gain: Tensor) -> str | None:
    """Rename the keys of one layer in place; a plain layer's weight is factored. Returns what is wrong, or None.

    Args:
        state_dict: changed in place.
        prefix: of the layer's keys.
        factorization: of the layer.
        eps: of the layer.
        gain: the layer's, for its shape and dtype.
    """
    if f"{prefix}v" in state_dict:
        return None
    for keys in FOREIGN_KEYS.get(factorization, ()):
        if all(prefix + key in state_dict for key in keys):
            for key, own in keys.items():
                state_dict[prefix + own] = state_dict.pop(prefix + key)
            if factorization == "spectral_norm":  # torch's has no gain
                state_dict[f"{prefix}g"] = state_dict[f"{prefix}v"].new_ones(gain.shape)
            return None
    weight = state_dict.get(f"{prefix}weight")
    if weight is None:
        return None
    try:
        factors = factor_weight(weight.detach(), factorization, eps)
        if weight.dtype != gain.dtype:  # a mean is judged in the precision that it was stored in, a gain is not
            factors = factor_weight(weight.detach().to(gain.dtype), factorization, eps, project=True)
    except (TypeError, ValueError) as error:
        return f"{prefix}weight cannot be factored: {error}"
    del state_dict[f"{prefix}weight"]
    state_dict.update({prefix + own: value for own, value in factors._asdict().items() if value is not None})
    return None
