"""From records to arrays of token ids."""
