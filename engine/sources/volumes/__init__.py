"""Volumes: a reader for each family of formats, behind the protocol `Volume`, and the grid that they share."""
