"""The pages of dashboards: self-contained HTML files, made from the templates of this folder."""

import json
from typing import Any

from jinja2 import Environment, PackageLoader

from sae_query_steer.dashboards.site_data import SiteDashboard

MAX_PAGE_BYTES = 60_000_000
"""Our choice: a browser opens a page of this size in a few seconds."""

PAGES = Environment(loader=PackageLoader("sae_query_steer.dashboards", ""), autoescape=True)
PAGES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}


def dashboard_html(dashboard: SiteDashboard, *, max_bytes: int = MAX_PAGE_BYTES) -> str:
    """Return the page of a site.

    Args:
        dashboard: what it shows.
        max_bytes: largest page. The number of texts per latent is halved until the page fits, down
            to one; the page states it.
    """
    template = PAGES.get_template("page.html")
    k = dashboard.tops.activations[dashboard.site.hook_name].shape[-1]
    page = template.render(data=dashboard.data(k))
    while len(page) > max_bytes and k > 1:
        k //= 2
        page = template.render(data=dashboard.data(k))
    return page


def page_data(page: str) -> dict[str, Any]:
    """Return the data of a page.

    Raises:
        ValueError: `dashboard_html` did not make the page.
    """
    _, found, rest = page.partition('<script type="application/json" id="data">')
    if not found:
        raise ValueError("the page holds no data: give a page that write_dashboards wrote")
    return json.loads(rest.partition("</script>")[0])
