"""The page: explanations, uses of heads and comparisons as one HTML file, or as pictures."""

from headwise.apps.pages.page import page, write_page, write_pngs

__all__ = ["page", "write_page", "write_pngs"]
