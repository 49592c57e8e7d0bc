"""Text out of a trained model: chunked prefill, then one token at a time."""
