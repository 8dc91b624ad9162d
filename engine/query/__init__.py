"""An image or a place -> hits, with pictures."""

from patchmill.query.picture import draw_hits, save_picture
from patchmill.query.query import Hit, QueryResult, query_image, query_place

__all__ = ["Hit", "QueryResult", "draw_hits", "query_image", "query_place", "save_picture"]
