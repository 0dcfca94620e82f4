"""What the site shows besides docs/: pages from elsewhere in the repository, and all flags.

`mkdocs.yml` names this file; MkDocs calls `on_files` and `on_page_markdown`.
"""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, not an installed gradjax

from gradjax.cli import app, command  # noqa: E402

# Files outside docs/, by the page that they become.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "measurements.md": "benchmarks/RESULTS.md",
}
_LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(?=[)#])")  # a relative link's target, without #anchor


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "flags.md", content=flags_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages of the site."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {file: name for name, file in PAGES.items()}

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[0]))
        return pages.get(target) or target.removeprefix("docs/")

    return _LINK.sub(on_site, markdown)


def flags_page() -> str:
    """What `--help` of every command says, as Markdown."""
    parts = [
        f"## gradjax {name}\n\n```text\n{command.help_text(one)}\n```\n"
        for name, one in app.COMMANDS.items()
    ]
    return "\n".join(["# Commands and flags\n", "What `gradjax COMMAND --help` says.\n", *parts])
