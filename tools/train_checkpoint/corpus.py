"""Documentation in Debian packages -> plain text, one string a document."""

import gzip
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = ("python3.11-doc", "manpages", "manpages-dev", "debian-reference-en", "debian-policy")
SHORTEST = 400  # characters; shorter files are indexes and redirections
NOT_PROSE = re.compile(
    r"copyright|changelog|genindex|searchindex|modindex|_index|NEWS|_sources|/search\.html|contents\.html"
)
TEXT = (".txt", ".rst", ".md", ".asc")
HIDDEN = {"script", "style", "nav", "head"}
BLOCKS = set("p div li dt dd h1 h2 h3 h4 h5 tr pre table ul ol br dl section".split())  # noqa: SIM905 (shorter)
SPHINX_BODY = re.compile(r'<div class="body" role="main">(.*?)<div class="sphinxsidebar"', re.DOTALL)


def download(packages: list[str], folder: Path) -> None:
    """Fetch each package with apt-get, if it is not there yet, and unpack it to folder/<package>."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not [*folder.glob(f"{package}_*.deb")]:
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        if not (folder / package).is_dir():
            subprocess.run(["dpkg-deb", "-x", next(folder.glob(f"{package}_*.deb")), folder / package], check=True)


def documents(folder: Path, packages: list[str]) -> list[str]:
    """Every different document in the unpacked packages, in a fixed order."""
    found: dict[str, str] = {}  # by how it begins: the same page often comes under several names
    for package in packages:
        for file in sorted((folder / package).rglob("*")):
            if file.is_file() and not file.is_symlink() and not NOT_PROSE.search(str(file)):
                text = _text(file)
                if len(text) >= SHORTEST and "\0" not in text:
                    found.setdefault(text[:2000], text)
    return list(found.values())


def _text(file: Path) -> str:
    """The prose of one file; empty for what is none."""
    name = file.name.removesuffix(".gz")
    if "man" in file.parts:
        return _manual_page(file)
    if not name.endswith((".html", ".htm", *TEXT)):
        return ""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    text = data.decode("utf-8", "ignore")
    return text.strip() if name.endswith(TEXT) else html_to_text(text)


def html_to_text(html: str) -> str:
    """The visible text of a page, its lines where the blocks are; of a Sphinx page without the frame around it."""
    body = SPHINX_BODY.search(html)
    page = _Page()
    page.feed(body[1] if body else html)
    text = "".join(page.pieces).replace("¶", "")
    return re.sub(r"\n\s*\n\s*\n+", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden = self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._hidden += tag in HIDDEN
        self._preformatted += tag == "pre"
        self.pieces += ["\n"] * (tag in BLOCKS) + ["- "] * (tag == "li")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in HIDDEN))
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        self.pieces += ["\n"] * (tag in BLOCKS)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data if self._preformatted else re.sub(r"\s+", " ", data))


def _manual_page(file: Path) -> str:
    """The page as `man` shows it, without bold and underline."""
    if not shutil.which("man"):
        raise SystemExit("manual pages need `man`: apt-get install man-db, or leave the manpages packages out")
    page = subprocess.run(
        ["man", "-l", "--no-hyphenation", "--no-justification", "-Tutf8", file],
        capture_output=True,
        env=os.environ | {"MANWIDTH": "90", "MANROFFOPT": "-c", "GROFF_NO_SGR": "1"},
        check=False,  # a page that groff complains about is still readable
    )
    return re.sub(".\b", "", page.stdout.decode("utf-8", "ignore")).strip()
