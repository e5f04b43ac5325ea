"""Measurements that stand beside the reading path: nothing in ref/, kernels/ or the run scripts imports them."""
