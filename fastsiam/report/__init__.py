"""Report of runs: folders read, figures drawn, a page written."""
