"""The language model: forward pass, attention, packing, pooling, LoRA, and its files."""
