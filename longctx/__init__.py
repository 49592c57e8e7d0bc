"""longctx: language models with very long memory, in JAX and Flax NNX."""

__version__ = '0.1.0'
