"""Any step of a run, made again: its views, its loss and its gradients."""
