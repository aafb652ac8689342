"""Calibration data to densities."""
