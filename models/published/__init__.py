"""What others published: readers of their weights, their sizes, their tokenizers."""
