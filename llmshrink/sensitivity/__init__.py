"""What fewer bits cost in each layer of a model: measured, kept for other runs, told."""
