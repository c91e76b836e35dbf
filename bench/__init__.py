"""Benches; results with command, machine and commit in results.md."""
