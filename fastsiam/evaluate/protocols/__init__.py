"""Protocols of `python -m fastsiam.evaluate`, one file each: `add_arguments(parser)` and `run(arguments)`."""
