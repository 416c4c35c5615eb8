"""Train OPT language models, 125M to 175B parameters, with tensor parallelism and ZeRO."""
