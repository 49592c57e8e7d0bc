"""Tasks whose answers are known: arrays of symbols for experiments (token_batches), text for any tokenizer (table)."""
