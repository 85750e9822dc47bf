"""The ways to store a model's linears that a runtime carries on a device, and what bits a user may name. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dwindle.devices.device_profile import FLOAT_FORMATS
from dwindle.errors import RecipeError, did_you_mean
from dwindle.prune.stored_size import EMBEDDING_BITS, TABLE_SHARE, Storage, StorageScheme

if TYPE_CHECKING:
    from dwindle.devices.device_profile import DeviceProfile

__all__ = ["MIXED_BITS", "storages"]

MIXED_BITS = (2.5, 3.5)
"""Averages of mixed codes that are tried where the runtime carries widths around them."""
_LEAST_BITS = 2
"""Fewer are not tried unless named: a code of one bit needs training of its own."""
_PREFIXES: tuple[tuple[StorageScheme, str], ...] = (("palettize", "palette"), ("integer", "int"))


def storages(profile: DeviceProfile, runtime: str, bits: float | None, float_bits: int) -> tuple[Storage, ...]:
    """Return the ways to store a model, fewest bits first: the one that `bits` names, or all worth trying.

    Raises RecipeError for a runtime that the device does not have, and bits that it does not carry there.
    """
    if runtime not in profile.runtimes:
        raise RecipeError(f"fit: {profile.title} has no runtime {runtime!r}{did_you_mean(runtime, profile.runtimes)}.")
    listed = profile.runtimes[runtime].weight_formats
    scheme, widths = _widths(listed)
    floats = [Storage("float", float_bits, float_bits)] if any(name in listed for name in FLOAT_FORMATS) else []
    if bits is None:
        plain = [Storage(scheme, width, float_bits) for width in widths if width >= _LEAST_BITS]
        means = [mean + TABLE_SHARE[scheme] for mean in MIXED_BITS]
        mixed = [Storage(scheme, mean, float_bits, mixed=True) for mean in means if _between(mean, widths, scheme)]
        found = [*plain, *mixed, *floats]
    elif bits in widths:
        found = [Storage(scheme, int(bits), float_bits)]
    elif bits == float_bits and floats:
        found = floats
    elif _between(bits, widths, scheme):
        found = [Storage(scheme, bits, float_bits, mixed=True)]
    else:
        found = []
    if not found:
        carried = ", ".join(map(str, widths)) or "no quantized weights"
        own = f", or {float_bits} (float, as the checkpoint)" if floats else ""
        raise RecipeError(
            f"fit: bits={bits}: {runtime} on {profile.title} carries {carried}{' bits' if widths else ''}"
            f"{', or an average between the least and the most of them' if len(widths) > 1 else ''}{own}."
        )
    return tuple(sorted(found, key=lambda storage: storage.code_bits))


def _widths(listed: tuple[str, ...]) -> tuple[StorageScheme, tuple[int, ...]]:
    """Return the scheme a runtime prefers, palettes before integers, and its bits; none without 8-bit embeddings."""
    for scheme, prefix in _PREFIXES:
        widths = sorted(int(name.removeprefix(prefix)) for name in listed if name.startswith(prefix))
        if widths and f"int{EMBEDDING_BITS}" in listed:
            return scheme, tuple(widths)
    return "palettize", ()


def _between(mean: float, widths: tuple[int, ...], scheme: StorageScheme) -> bool:
    """Return whether mixed bits can have this mean, tables included, with a little room for those of palettes."""
    return len(widths) > 1 and min(widths) + max(TABLE_SHARE[scheme], 0.1) <= mean <= max(widths)
