"""Energy of the contenders of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from headwise.apps.bench.settings import Settings
from headwise.apps.energy.counters import meter_of
from headwise.apps.energy.windows import Work, measure


def energy(
    settings: Settings,
    runs: Mapping[str, Callable[[], object]],
    work: Callable[[], Mapping[str, Work]],
    before: Callable[[str], object] | None = None,
) -> dict:
    """``{"energy": ...}`` of :func:`headwise.apps.energy.windows.measure`, if the settings ask for
    it."""
    if settings.energy is None:
        return {}
    meter, device = meter_of(settings.device), settings.device
    return {"energy": measure(runs, work(), meter, settings.energy, device, before=before)}
