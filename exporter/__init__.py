"""Desktop side of Shoal: a trained Keras model, its data and a fleet become a bundle of pieces."""
