"""DDNN: binarized device blocks, exits, tiers and sensor fusion."""
