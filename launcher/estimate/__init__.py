"""Arithmetic for the plan: the memory and time of a pack on a device. The way in is `forecaster.Forecaster`."""
