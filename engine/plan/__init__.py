"""Geometry: which tiles a slide has, where, in which order. Fixed before any pixel is embedded."""

from patchmill.plan.blocks import blocks
from patchmill.plan.picture import draw_plan
from patchmill.plan.planner import mask_of, plan_slide
from patchmill.plan.roi import ROI_SUFFIXES, Roi, read_roi

__all__ = ["ROI_SUFFIXES", "Roi", "blocks", "draw_plan", "mask_of", "plan_slide", "read_roi"]
