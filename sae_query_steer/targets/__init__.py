"""Targets of steering: class centroids, their builder, and fingerprints of models."""
