"""Tasks that come with the package: models and texts on which steering can be tried and checked."""
