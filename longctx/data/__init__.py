"""Corpora, tokenizers, packing and resumable streams of batches."""
