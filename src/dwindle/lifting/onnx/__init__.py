"""ONNX files become trainable Keras models, operator by operator."""
