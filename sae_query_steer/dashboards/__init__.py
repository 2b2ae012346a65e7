"""Dashboards of latents: one page for each site, as people know them from sae_vis and Neuronpedia.

`statistics` and `attention_effect` gather what a page shows; `site_data` lays it out, and
`write_dashboards` writes it.
"""
