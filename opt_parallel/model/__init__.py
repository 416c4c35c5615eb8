"""OPT: the network, its heads, generation, and Hugging Face's names and files."""
