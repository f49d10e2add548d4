"""Bytes, operations and launches of a compiled training step, counted without a GPU: the ledger."""
