"""Geometry: which tiles a source has, where, in which order. Fixed before any pixel is embedded."""

from patchmill.plan.blocks import blocks
from patchmill.plan.images import plan_images
from patchmill.plan.picture import draw_plan
from patchmill.plan.planner import mask_of, plan_slide
from patchmill.plan.roi import ROI_SUFFIXES, Roi, read_roi
from patchmill.plan.volumes import Sections, chunks_in, plan_volume, runs, sections

__all__ = [
    "ROI_SUFFIXES",
    "Roi",
    "Sections",
    "blocks",
    "chunks_in",
    "draw_plan",
    "mask_of",
    "plan_images",
    "plan_slide",
    "plan_volume",
    "read_roi",
    "runs",
    "sections",
]
