"""Arguments and options that several commands take. Their defaults are those of the settings, named once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from patchmill.types import PlanSettings, VolumeSettings

__all__ = [
    "ArchivePath",
    "As",
    "Coords",
    "Decode",
    "EncoderKey",
    "Every",
    "Frame",
    "Mask",
    "MinTissue",
    "Mpp",
    "MppOverride",
    "Output",
    "Overlap",
    "PlanKey",
    "Planes",
    "Precision",
    "Reader",
    "Runtime",
    "Sources",
    "Spacing",
    "TileSide",
    "Tissue",
    "Voxel",
    "Weights",
]

_plan, _volume = PlanSettings(), VolumeSettings()

ArchivePath = Annotated[Path, typer.Argument(metavar="ARCHIVE", help="the archive's folder")]
PlanKey = Annotated[str | None, typer.Option("--plan", help="plan key, where the archive holds several")]
EncoderKey = Annotated[
    str | None, typer.Option("--encoder", help="encoder key or name, where the archive holds several")
]
Output = Annotated[
    str | None,
    typer.Option(help="which vectors, where the encoder has several, such as cls or mean; its first by default"),
]
Weights = Annotated[Path | None, typer.Option(help="weights file: safetensors, the index of several, or .pth")]
Sources = Annotated[
    list[str], typer.Argument(metavar="SRC", help="slides, volumes or images: files, folders, globs or CSV catalogs")
]
As = Annotated[
    Literal["slide", "volume", "images"] | None,
    typer.Option("--as", help="what SRC holds, where a folder may be read in two ways"),
]
# Which of these there are depends on what is embedded, so that none has a value of its own here.
Mpp = Annotated[float | None, typer.Option(help=f"slides: micrometres per tile pixel; {_plan.mpp} by default")]
TileSide = Annotated[
    int | None,
    typer.Option("--tile", help=f"pixels per side of a tile; slides: {_plan.tile} by default, volumes: whole slices"),
]
Overlap = Annotated[int | None, typer.Option(help="pixels shared with the next tile; 0 by default")]
Tissue = Annotated[
    Literal["auto", "none"] | None,
    typer.Option(help="auto looks for tissue, or for a volume's body; none keeps all"),
]
MinTissue = Annotated[
    float | None,
    typer.Option(help=f"least tissue fraction of a tile; slides {_plan.min_tissue}, volumes {_volume.min_tissue}"),
]
Planes = Annotated[
    str | None, typer.Option(help="volumes: axial,coronal,sagittal; by default axial, and all of an isotropic volume")
]
Spacing = Annotated[float | None, typer.Option(help="volumes: millimetres per pixel; the volume's finest by default")]
Every = Annotated[int | None, typer.Option(help="volumes: take each n-th slice alone")]
Frame = Annotated[int | None, typer.Option(help="volumes: which one of a file that holds several, from 0")]
Voxel = Annotated[
    str | None, typer.Option(metavar="X,Y,Z", help="volumes: millimetres per voxel where the file tells none")
]
Mask = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="slides: own tissue, GeoJSON or PNG of one, or a folder with one per slide"),
]
Coords = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="slides: own tiles, HDF5 of CLAM or TRIDENT, or a folder with one per slide"),
]
Decode = Annotated[
    Literal["scaled", "exact"] | None,
    typer.Option(
        help="slides: scaled, the default, has JPEG decoded at 1/2 or 1/4 where tiles are shrunk by that; exact never"
    ),
]
Reader = Annotated[
    Literal["auto", "dicom", "ndpi", "omezarr", "openslide", "tiff"],
    typer.Option(help="slides: who decodes; auto chooses for each file and names it"),
]
Precision = Annotated[
    Literal["auto", "fp32", "fp16", "bf16", "int8"],
    typer.Option(help="auto takes the fastest whose vectors agree with fp32's here"),
]
Runtime = Annotated[
    Literal["auto", "cpu", "torch", "cuda", "tensorrt"],
    typer.Option(help="what runs the encoder; auto takes a GPU where torch or ONNX Runtime can use it"),
]
MppOverride = Annotated[
    float | None, typer.Option(help="slides: micrometres per level-0 pixel, in place of the file's")
]
