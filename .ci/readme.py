"""Puts files of results/ into the README, between `<!-- from FILE -->` and `<!-- end -->`.

`python .ci/readme.py` writes; with --check it fails if the README is behind the results.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"(<!-- from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The README's text with every place filled from its file, where that file exists."""

    def fill(match: re.Match[str]) -> str:
        source = ROOT / match[2]
        if not source.exists():
            return match[0]
        return f"{match[1]}\n{source.read_text().strip()}\n\n{match[3]}"

    return PLACE.sub(fill, text)


if __name__ == "__main__":
    path = ROOT / "README.md"
    old = path.read_text()
    new = filled(old)
    if "--check" in sys.argv[1:] and old != new:
        sys.exit("README.md is behind results/: run `make readme`")
    path.write_text(new)
