"""Measures a config on this machine, predicts its run, and names the stage that limits it."""
