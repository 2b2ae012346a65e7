"""SAEs of many sites from one stream of queries: runs that can be stopped and shared."""
