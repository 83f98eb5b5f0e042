"""What 8-bit products cost, and how little has to stay in half precision for a model to be lossless."""
