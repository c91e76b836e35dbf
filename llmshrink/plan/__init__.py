"""What would be done to every layer of a model, what it would weigh, and what cannot be done: before any compute.

A plan reads the recipe, config.json and the safetensors headers. Sizes are exact, because formats pack tensors without
data on the `meta` device and the files' headers follow from names and shapes.
"""
