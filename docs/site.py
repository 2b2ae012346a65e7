"""Hooks of MkDocs: pages whose source lies elsewhere, so that each text is written once.

README, CHANGELOG, CONTRIBUTING, the licence and the tutorials come from the root of the
repository, the page of the command line from the command line itself, and the reference from the
public names of the package and its sub-namespaces.
"""

import inspect
import io
import re
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from sae_query_steer.cli.main import COMMANDS, run
from sae_query_steer.config import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
FROM_ROOT = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff")
COMMAND_LINE = "reference/command_line.md"
NAMESPACES = (
    *("scopes", "objectives", "control", "sae", "steering", "learning"),
    *("baselines", "diagnostics", "compare", "integrations"),
    *("hub", "plots", "dashboards", "toy", "config"),
)
"""Each is one page of the reference; `reference/front.md` has the other names of the front."""


def reference() -> dict[str, str]:
    """Return the pages of the reference: a directive for every public name, each name once."""
    pages, shown = {}, set()
    for space in (*NAMESPACES, "front"):
        package = "" if space == "front" else f"sae_query_steer.{space}"
        package = (
            f"sae_query_steer.descent.{space}" if space in ("objectives", "control") else package
        )
        module = import_module(package or "sae_query_steer")
        names = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
        lines = [f"# {space if package else 'sae_query_steer'}", "", str(module.__doc__), ""]
        for name in names:
            value = getattr(module, name)
            if isinstance(value, ModuleType) or id(value) in shown:
                continue
            shown.add(id(value))
            home = getattr(value, "__module__", "")
            if not home.startswith("sae_query_steer"):
                home = module.__name__
            try:
                inspect.getsource(value)
                lines += [f"::: {home}.{name}", ""]
            except OSError:  # a class made by a function, which static analysis does not find
                lines += [f"## `{name}`", "", str(value.__doc__), ""]
            except TypeError:  # a constant
                lines += [f"::: {home}.{name}", ""]
        pages[f"reference/{space}.md"] = "\n".join(lines)
    return pages


def command_line() -> str:
    """Return the help of all commands as Markdown."""
    kinds = [kind.name.removeprefix("query_head_").replace("_", "-") for kind in ARCHITECTURES]
    names = [command.__name__.replace("_", "-") for command in COMMANDS]
    pages = [[], *([name] for name in names), *(["train", kind] for kind in kinds)]
    return "# Command line\n" + "".join(map(_help_page, pages))


def _help_page(command: list[str]) -> str:
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        run([*command, "--help"])
    title = " ".join(["sae-query-steer", *command])
    return f"\n## `{title}`\n\n```text\n{text.getvalue()}```\n"


@event_priority(100)  # before the plugin that looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    notebooks = [f"tutorials/{path.name}" for path in (ROOT / "tutorials").glob("*.ipynb")]
    for path in (*FROM_ROOT, *sorted(notebooks)):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, COMMAND_LINE, content=command_line()))
    for path, content in reference().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Mend the links between the root and `docs`, which are one folder on the site.

    Badges are left out: their pictures would be asked of the network.
    """
    markdown = re.sub(r"^.*https://img\.shields\.io/.*\n", "", markdown, flags=re.MULTILINE)
    return markdown.replace("](docs/", "](").replace("](../README.md", "](README.md")


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Mend the links of tutorials, which reach MkDocs as HTML."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    html = re.sub(r'href="\.\./docs/(\w+)\.md', r'href="../\1.html', html)
    return re.sub(r'href="(\w+)\.ipynb', r'href="\1.html', html)
