"""The page of a site: one HTML file that holds all it needs."""

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

from sae_query_steer.dashboards.site_data import SiteDashboard

MAX_PAGE_BYTES = 60_000_000
"""Our choice: a browser opens a page of this size in a few seconds."""


def dashboard_html(dashboard: SiteDashboard, *, max_bytes: int = MAX_PAGE_BYTES) -> str:
    """Return the page of a site.

    A page that would be too large shows fewer texts of each latent, and says so.

    Args:
        dashboard: what it shows.
        max_bytes: the largest page; one with a single text a latent may be larger.
    """
    k = dashboard.tops.activations[dashboard.site.hook_name].shape[-1]
    page = _page(dashboard.data(k))
    while len(page) > max_bytes and k > 1:
        k //= 2
        page = _page(dashboard.data(k))
    return page


def index_html(pages: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """Return a page with links to those of the sites.

    Args:
        pages: file by hook name.
        settings: shown below.
    """
    links = "".join(
        f'<li><a href="{html.escape(file)}">{html.escape(name)}</a></li>'
        for name, file in pages.items()
    )
    rows = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in settings.items()
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>Latents of queries</title><style>{_resource('page.css')}</style>"
        f"<main class='index'><h1>Latents of queries</h1><ul>{links}</ul>"
        f"<table>{rows}</table></main></html>"
    )


def page_data(page: str) -> dict[str, Any]:
    """Return the data that a page holds.

    Raises:
        ValueError: it is no page of `dashboard_html`.
    """
    _, found, rest = page.partition(_DATA)
    if not found:
        raise ValueError("the page holds no data: give a page that write_dashboards wrote")
    return json.loads(rest.partition("</script>")[0])


_DATA = '<script type="application/json" id="data">'


def _page(data: Mapping[str, Any]) -> str:
    # Within a script element only "<" could end it or open a comment; \u003c is the same in JSON.
    packed = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return Template(_resource("page.html")).substitute(
        title=html.escape(f"{data['site']}: latents"),
        style=_resource("page.css"),
        data=f"{_DATA}{packed}</script>",
        script=_resource("charts.js") + _resource("page.js"),
    )


def _resource(name: str) -> str:
    return (files("sae_query_steer.dashboards") / name).read_text(encoding="utf-8")
