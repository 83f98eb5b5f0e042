"""What calibrated methods look at: text, the walk through the decoder layers, Hessians, gradients."""
