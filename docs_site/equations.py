"""LaTeX becomes MathML while the site is built: browsers draw it without scripts, fonts or a network."""

import re

from latex2mathml.converter import convert

# Rows that the source aligns, outside of any environment, as Sphinx's math directive allows.
_ROWS = re.compile(r"\\\\|&")


def mathml(latex: str, *, display: bool) -> str:
    """Return the MathML of an equation; raise ``ValueError`` for a command that cannot be drawn."""
    source = latex.strip()
    if display and _ROWS.search(source) and "\\begin{" not in source:
        source = rf"\begin{{aligned}}{source}\end{{aligned}}"
    drawn = convert(_words(source), display="block" if display else "inline")
    if unknown := re.search(r">\\\w+<", drawn):
        raise ValueError(f"no MathML for {unknown[0].strip('><')} in: {latex}")
    return drawn


def _words(latex: str) -> str:
    """Write names such as sign and rms as text: in MathML, ``\\mathrm`` would space their letters out."""
    return re.sub(r"\\(?:mathrm|operatorname)\{([A-Za-z]{2,})\}", r"\\text{\1}", latex)
