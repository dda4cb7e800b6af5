"""The papers' networks as plain Keras builders, every layer named so that exports are reproducible."""
