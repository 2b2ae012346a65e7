"""Evaluation: texts generated with and without a steer, and what they score."""
