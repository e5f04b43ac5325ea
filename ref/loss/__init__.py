"""The soft-label contrastive loss: contrastive.py is the idea, training_loss.py what training calls."""
