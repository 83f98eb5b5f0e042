"""Calibration: text, the walk through the decoder layers, Hessians, gradients."""
