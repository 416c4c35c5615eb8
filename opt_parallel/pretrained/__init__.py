"""OPT's classes as Hugging Face documents them. Import them from `opt_parallel`."""
