"""Edge^nAI: small networks pruned to a share of the classes each, fused by their entropies."""
