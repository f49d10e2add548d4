"""Experiments of the SimSiam paper (arXiv 2011.10566), one command each: its ablations beside its numbers."""
