"""Dashboards of latents: one page for each site, as people know them from sae_vis and Neuronpedia.

`statistics` and `attention_effect` gather what a page shows; `site_data` lays it out, and
`write_dashboards` writes it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
