"""Encoders by themselves: which there are, whether one is right here, and its graph for other runtimes."""

from pathlib import Path

from patchmill import encoders
from patchmill.encoders import GateReport
from patchmill.encoders import known as list_encoders
from patchmill.types import EncodeSettings

__all__ = ["check_encoder", "export_encoder", "list_encoders"]


def check_encoder(settings: EncodeSettings) -> GateReport:
    """Prove an encoder against its reference on this machine. Raises EncoderError with the figures if it fails."""
    encoder, report = encoders.open_gated(settings, afresh=True)
    encoder.close()
    return report


def export_encoder(settings: EncodeSettings, path: str | Path) -> None:
    """Write an encoder's ONNX graph for other runtimes, with its weights in `<path>.data`. Raises EncoderError."""
    encoders.export(settings, Path(path))
