"""Labelled examples and token rows: reading, checking, tokenising."""
