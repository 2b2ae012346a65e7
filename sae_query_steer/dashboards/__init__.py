"""Dashboards of latents: one page for each site, as people know them from sae_vis and Neuronpedia.

What a page shows is gathered in `statistics`, `attention_effect`, `key_matches` and
`class_shares`, laid out in `site_data`, and written by `write_dashboards`.
"""
