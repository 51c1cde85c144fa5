"""One page from any number of experiments; the same tables on a terminal and in Markdown."""

from .merge import Section, load, ranking
from .page import write_report
from .terminal import section_table

__all__ = ["Section", "load", "ranking", "section_table", "write_report"]
