"""Encoders in the formats of other libraries, one file each: `write(encoder, out)` returns the code that loads it."""
