"""The command line."""

from llmshrink.cli.app import main

__all__ = ["main"]
