"""Measures of samples, likelihood, calibration and robustness, one file each."""
