"""Files of weights: safetensors, and the checkpoints of quantization libraries in them."""
