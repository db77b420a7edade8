"""Every private name of Keras and TensorFlow that hvdkit uses: one function for each name, with a test of its own."""
