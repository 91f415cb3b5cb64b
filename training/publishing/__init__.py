"""What others see of a run: pictures, the model card and its audit, and the Hub."""
