"""Evaluation of an encoder: kNN, collapse measures, pictures for the report."""
