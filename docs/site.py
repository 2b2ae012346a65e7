"""Hooks of MkDocs: pages whose source lies elsewhere, so that each text is written once.

README, CHANGELOG, CONTRIBUTING, the licence and the tutorials come from the root of the
repository, the page of the command line from the command line itself.
"""

import re
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from sae_query_steer.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
FROM_ROOT = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff")
COMMAND_LINE = "reference/command_line.md"


def command_line() -> str:
    """Return the help of all commands as Markdown."""
    group = typer.main.get_group(app)
    context = typer.Context(group, info_name="sae-query-steer")
    commands = group.commands.values()
    pages = [
        get_docs_for_click(obj=command, ctx=context, indent=1, call_prefix="sae-query-steer")
        for command in commands
    ]
    return "\n".join(["# Command line", "", group.help or "", "", *pages])


@event_priority(100)  # before the plugin that looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    notebooks = [f"tutorials/{path.name}" for path in (ROOT / "tutorials").glob("*.ipynb")]
    for path in (*FROM_ROOT, *sorted(notebooks)):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, COMMAND_LINE, content=command_line()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Mend the links between the root and `docs`, which are one folder on the site.

    Badges are left out: their pictures would be asked of the network.
    """
    markdown = re.sub(r"^.*https://img\.shields\.io/.*\n", "", markdown, flags=re.MULTILINE)
    return markdown.replace("](docs/", "](").replace("](../README.md", "](README.md")
