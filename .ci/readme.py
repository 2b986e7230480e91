"""Puts files of results/ into the READMEs, between `<!-- from FILE -->` and `<!-- end -->`.

`python .ci/readme.py` writes; with --check it fails if a README is behind the results.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "results/README.md", "results/symmetry/README.md")
PLACE = re.compile(r"(<!-- from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page's text with every place filled from its file, where that file exists."""

    def fill(match: re.Match[str]) -> str:
        source = ROOT / match[2]
        if not source.exists():
            return match[0]
        return f"{match[1]}\n{source.read_text().strip()}\n\n{match[3]}"

    return PLACE.sub(fill, text)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        old = path.read_text()
        new = filled(old)
        if "--check" in sys.argv[1:] and old != new:
            sys.exit(f"{page} is behind results/: run `make readme`")
        path.write_text(new)
