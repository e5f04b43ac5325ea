"""Helpers shared by all subpackages: files, devices, processes, progress. Nothing here knows the method."""
