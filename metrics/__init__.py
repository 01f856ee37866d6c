"""Measures of samples, likelihood, calibration and robustness; see DESIGN in README."""
