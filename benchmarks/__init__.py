"""Measurements and studies. Neither ref/ and kernels/ nor the run scripts import anything from here."""
