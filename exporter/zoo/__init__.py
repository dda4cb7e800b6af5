"""The papers' networks as plain Keras builders; every layer is named: exports reproduce."""
