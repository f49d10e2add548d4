"""Numbers of a run in an experiment tracker, copied from its metrics.jsonl while it grows."""
