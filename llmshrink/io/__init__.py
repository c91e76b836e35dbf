"""Files: safetensors containers, atomic writes, and where a model's files come from."""
