"""Standardised uptake values of PET by body weight: the factor from what a series stores.

Source: QIBA, "SUV vendor-neutral pseudo-code" (happy path); DICOM PS3.3, C.8.9.1 (PET).
"""

import math
import re
from collections.abc import Sequence
from datetime import datetime, timedelta

from patchmill.sources.volumes.dicomseries import Tracer

__all__ = ["suv_factor"]

DATE, TIME = re.compile(r"\d{8}"), re.compile(r"(\d\d)(\d\d)(\d\d)?(\.\d{1,6})?")
MOMENT = re.compile(r"(\d{8})(\d{6}(\.\d{1,6})?)")  # without an offset from UTC, which the other times do not have
MOST_HALF_LIVES = 20.0  # from injection to scan; more is a wrong date


def suv_factor(tracers: Sequence[Tracer]) -> float | None:
    """What a series' real values are to be multiplied with to become SUV by body weight, in g/ml; None: not told.

    SUV = Bq/ml * weight in g / dose in Bq, the dose decayed to the time that values are corrected to: with START, to
    the series' time, or to the earliest acquisition where the series' time is later (a series that was made
    afterwards); with ADMIN, to the injection, so not at all. Values must be corrected for decay and attenuation. An
    injection for which no date is told was within the 24 hours before. GML with SUVType BW or none is SUV already.
    """
    first = tracers[0]
    facts = {(t.units, t.suv_type, t.decay, t.weight, t.dose, t.half_life, t.injected, t.series) for t in tracers}
    if len(facts) > 1:
        return None
    if first.units == "GML":
        return 1.0 if first.suv_type in ("", "BW") else None
    if first.units != "BQML" or not all({"DECY", "ATTN"} <= set(each.corrected) for each in tracers):
        return None
    if not all(math.isfinite(figure) and figure > 0 for figure in (first.weight, first.dose, first.half_life)):
        return None
    seconds = 0.0
    if first.decay != "ADMIN":
        acquired = [moment(*each.acquired) for each in tracers]
        known = [each for each in acquired if each is not None]
        scan = moment(*first.series)
        if first.decay != "START" or scan is None or len(known) < len(acquired):
            return None
        scan = min(scan, *known)
        if (injected := injection(first, scan)) is None:
            return None
        seconds = (scan - injected).total_seconds()
    if not 0 <= seconds <= MOST_HALF_LIVES * first.half_life:
        return None
    return first.weight * 1000 / (first.dose * 2 ** (-seconds / first.half_life))


def injection(tracer: Tracer, scan: datetime) -> datetime | None:
    """When the tracer was injected; None if it is not told."""
    dated, time = tracer.injected
    if dated:
        found = MOMENT.fullmatch(dated)
        return moment(found[1], found[2]) if found else None
    at = moment(f"{scan.year:04}{scan:%m%d}", time)  # %Y has less than four digits of 1 January 1, as in place of dates
    if at is None or at <= scan:
        return at
    return at - timedelta(days=1) if at - datetime.min >= timedelta(days=1) else None


def moment(date: str, time: str) -> datetime | None:
    """A date (YYYYMMDD) and a time (HHMMSS.FFFFFF, from the minutes on optional) in one; None for what is neither."""
    found = TIME.fullmatch(time)
    if not DATE.fullmatch(date) or not found:
        return None
    hour, minute, second, fraction = found.groups()
    try:
        day = datetime(int(date[:4]), int(date[4:6]), int(date[6:]), int(hour), int(minute), int(second or 0))
    except ValueError:
        return None
    return day + timedelta(seconds=float(fraction or 0))
