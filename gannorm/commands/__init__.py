"""What the command lines do with a trained model."""
