"""What a model costs and is worth: quality, bytes, memory and speed."""
