"""Tasks whose answers are known: symbols for small models (symbolic), and text for any tokenizer (table)."""
