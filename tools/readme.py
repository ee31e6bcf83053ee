"""Write the README's generated part, the table of what ran where, from llmkernels/evidence/: `make readme`."""

import re
from pathlib import Path

from llmkernels import status

README = Path(__file__).parent.parent / "README.md"
PART = re.compile(r"(?<=<!-- status -->\n).*(?=<!-- end of status -->)", re.DOTALL)


def table() -> str:
    return status.markdown(status.rows(status.records())) + "\n"


if __name__ == "__main__":
    README.write_text(PART.sub(lambda _: table(), README.read_text()))
