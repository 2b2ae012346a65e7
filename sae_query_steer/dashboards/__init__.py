"""Dashboards of latents: one page for each site, as people know them from sae_vis and Neuronpedia.

`statistics`, `attention_effect` and `key_matches` gather what a page shows; `site_data` lays it
out, and `write_dashboards` writes it.
"""
