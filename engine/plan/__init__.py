"""Geometry: which tiles a slide has, where, in which order. Fixed before any pixel is embedded."""

from patchmill.plan.blocks import blocks
from patchmill.plan.planner import plan_slide

__all__ = ["blocks", "plan_slide"]
