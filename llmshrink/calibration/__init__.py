"""Text -> rows of token ids: seeded, packed, fingerprinted."""
