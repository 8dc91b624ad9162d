"""Dask: which shard runs where, retries, quarantine, progress, the run's report."""

from patchmill.cluster.driver import Event
from patchmill.cluster.report import RunReport, SourceOutcome
from patchmill.cluster.run import RunSettings, check, run
from patchmill.cluster.tasks import Doors, has_changed

__all__ = ["Doors", "Event", "RunReport", "RunSettings", "SourceOutcome", "check", "has_changed", "run"]
