"""What is refused before compute, proved of what was written, asked of a finished folder, judged by limits."""
