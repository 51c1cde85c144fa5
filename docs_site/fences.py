"""A hook of MkDocs: ```` ```math ```` blocks become MathML, and anchors are those that GitHub makes."""

from typing import Any

from equations import mathml
from mkdocs.config.defaults import MkDocsConfig
from pymdownx.slugs import slugify


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the format of equations, and the anchors."""
    fence = {"name": "math", "class": "math", "format": _format}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def _format(source: str, *args: Any, **kwargs: Any) -> str:
    return f'<div class="equation">{mathml(source, display=True)}</div>'
