"""Blocks of README.md that answer questions rather than show a benchmark's lines."""

from benchmarks.readme import by_component, summary

BLOCKS = {"summary": summary.text, "methods_by_component": by_component.text}
