"""Slides: a reader for each family of formats, behind the protocol `Slide`."""
