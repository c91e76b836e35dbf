"""llmshrink: make a language model smaller, and prove what it cost."""

__version__ = "0.1.0"
