"""Desktop side of Shoal: a trained Keras model, its data and a fleet become a bundle of pieces."""

import os

# Before anything here loads TensorFlow, also in worker processes: its start-up notes are not for
# people who export a model. An environment that asks for them is left alone.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault(
    "TF_ENABLE_ONEDNN_OPTS", "1"
)  # its default, but said aloud it is not announced
