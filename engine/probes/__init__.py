"""Light tasks on frozen embeddings."""

from patchmill.probes.metrics import Figure, Metrics
from patchmill.probes.probe import KnnResult, ProbeReport, probe_knn

__all__ = ["Figure", "KnnResult", "Metrics", "ProbeReport", "probe_knn"]
