"""What a model is made of: its files, its skeleton, its blocks and the matrices in them."""
