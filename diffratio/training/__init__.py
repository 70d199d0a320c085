"""Fine-tuning and pretraining on Lightning."""
