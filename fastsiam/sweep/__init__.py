"""Many runs as one: named variants of a config trained to their end, compared in one table and one page."""
