"""The commands of `sae-query-steer`; `cli` puts them together."""
