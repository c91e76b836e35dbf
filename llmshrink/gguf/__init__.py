"""What llama.cpp must be told of a model: names, numbers, vocabulary; and folders with a GGUF file read back."""
