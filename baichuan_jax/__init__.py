"""Baichuan 2 in JAX: from raw text to a trained, checkpointed, sampled model."""
