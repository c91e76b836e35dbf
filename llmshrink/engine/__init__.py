"""The streaming engine: one block resident, statistics gathered, compressed, written, journaled, dropped."""
