"""Image sources: folders, text lists, tar shards and .beton files, opened by `open.open_source`."""
