"""The model-card template, packed with the wheel so that an installed training run finds it."""
