"""What is told about a run: the report model, its tables and the model card."""
