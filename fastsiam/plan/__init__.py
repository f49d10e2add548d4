"""What `python -m fastsiam.plan` does: measure a config on this machine, predict its run, and say what limits it."""
