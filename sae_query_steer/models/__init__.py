"""The hosts' oddities, each in one place."""
